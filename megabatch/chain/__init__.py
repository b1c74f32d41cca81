"""Chains: jobs that wait for each other, declared as one object and submitted, or run here, as one graph."""
