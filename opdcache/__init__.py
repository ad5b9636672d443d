"""Offline-cached batch engine for on-policy distillation of language models."""
