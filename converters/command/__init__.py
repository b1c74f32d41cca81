"""`megabatch-convert`: the converters' command line."""

from megabatch.converters.command.main import main

__all__ = ["main"]
