"""From rows in files to batches."""
