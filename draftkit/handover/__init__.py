"""Drafters for other engines: what each takes, how it is written for it, and the command that runs it."""
