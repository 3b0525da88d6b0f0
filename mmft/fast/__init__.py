"""The fast path: optimisations of a training step that leave its numbers as they are, each in a file of its own."""
