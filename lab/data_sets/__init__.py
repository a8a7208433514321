"""Data sets: each file makes group-structured splits of a source's material."""
