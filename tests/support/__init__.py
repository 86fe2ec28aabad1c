"""What several test files share: small targets and drafters, servers to talk to, second implementations."""
