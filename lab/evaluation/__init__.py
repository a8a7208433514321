"""Losses, metrics and predictions on splits."""
