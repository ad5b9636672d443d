"""Launchers that carry out a run's plan, and ready runs."""
