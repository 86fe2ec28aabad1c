"""How much of each proposal to verify: survival estimates, step rate, planners, and a simulator of them."""
