"""Which attributes are shortcuts for which: networks, tables and figures."""
