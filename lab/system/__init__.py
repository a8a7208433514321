"""What knows nothing of learning: commands, errors, files, memory, processes."""
