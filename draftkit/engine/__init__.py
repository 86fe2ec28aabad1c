"""The engine: many requests at once, one flattened verification pass per step."""
