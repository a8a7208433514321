"""What the gradient flow does to the gap between groups, from one Gram matrix."""
