"""From answers to scores, intervals and the report."""
