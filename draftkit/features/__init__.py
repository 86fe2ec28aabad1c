"""Features: what the target thinks while it reads conversations; where training takes them from."""
