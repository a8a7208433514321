"""Where raw material comes from, one file per source: find, fetch, verify, decode."""
