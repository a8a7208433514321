"""Saved tables in, figures out; never torch."""
