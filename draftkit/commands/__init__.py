"""Commands that have a file of their own; `draftkit/cli.py` holds the table of all."""
