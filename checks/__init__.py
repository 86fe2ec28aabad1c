"""What must hold on a machine, for longer than a test may take: `python -m checks.NAME --help`, from the
root."""
