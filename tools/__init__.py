"""Commands for the people who make draftkit; the package does not hold them. Run from the root: `python -m
tools.NAME`."""
