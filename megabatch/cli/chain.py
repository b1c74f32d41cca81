"""`megabatch chain show FOLDER`."""

from __future__ import annotations

from pathlib import Path

from megabatch.chain.command import show_chain


def chain(action: str, folder: Path) -> int:
    """Exit code. Raises: LaunchError."""
    assert action == "show"
    return show_chain(folder.absolute())
