"""The `megabatch` command."""

from megabatch.cli.command import main

__all__ = ["main"]
