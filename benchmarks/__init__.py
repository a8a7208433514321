"""Speed and memory against naive twins, in one process, printed as ratios."""
