"""`megabatch chain show FOLDER` and `megabatch chain cancel FOLDER`."""

from __future__ import annotations

from pathlib import Path

from megabatch.chain.command import cancel_chain, show_chain


def chain(action: str, folder: Path) -> int:
    """Exit code. Raises: LaunchError."""
    return {"show": show_chain, "cancel": cancel_chain}[action](folder.absolute())
