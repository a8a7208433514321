"""Last layers trained anew on frozen features (DFR)."""
