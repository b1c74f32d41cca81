"""Proof on this machine that a recipe's runs resume bit for bit."""
