"""Training a drafter on captured features."""
