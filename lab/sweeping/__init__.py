"""Sweeps: many settings, many seeds, on this machine or a cluster."""
