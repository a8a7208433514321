"""One run's results folder: tables, status, resuming, trackers."""
