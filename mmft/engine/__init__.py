"""What runs: the loop, its state, checkpoints, guards and hooks."""
