"""Commands that `cli.py` adds to its table, one module each, and what commands have in common."""
