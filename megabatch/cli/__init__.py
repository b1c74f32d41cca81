"""Command lines: that of recipe files, and `megabatch`."""
