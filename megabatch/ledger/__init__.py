"""The ledger of rollouts: every completion that a run trained on, with what made it and what it was worth, on disk."""
