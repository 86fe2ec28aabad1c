"""Commands that have a file of their own, and what they share; `draftkit/cli.py` holds the table of all."""
