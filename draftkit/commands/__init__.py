"""One file for each command, and what they share; `draftkit/cli.py` holds the table of all."""
