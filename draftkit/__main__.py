"""`python -m draftkit` is the command `draftkit`."""

from draftkit.cli import main

main()
