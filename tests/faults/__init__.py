"""What goes wrong on real machines, done to real processes: `python -m tests.faults` prints one row per fault."""
