"""One file per family of adapter methods: what each does to row blocks of a weight."""
