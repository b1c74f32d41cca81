"""What `python recipes/x.py [flags]` does: plan, show, submit or run a recipe."""

from megabatch.entry.command import main

__all__ = ["main"]
