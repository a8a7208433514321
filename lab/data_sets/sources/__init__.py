"""Where raw material comes from: one file a source. Find, fetch, verify, unpack, decode."""
