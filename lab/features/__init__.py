"""Frozen backbones, their extraction and its cache."""
