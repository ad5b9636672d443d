"""Held-out evaluation: how far students are from the teacher, and how right their answers are."""
