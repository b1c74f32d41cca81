"""Shared memory that engines of vLLM left behind when they were killed (Linux).

vLLM's processes exchange through files in /dev/shm, up to hundreds of MiB each, and only an orderly end removes them.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_PATTERNS = ("psm_*", "*-cpushm*", "vllm_mm_*")
"""Names that Python and vLLM 0.32 give them."""
_SETTLED_S = 60.0
"""A younger file may be one that its process is about to open."""


def remove_leftovers(folder: Path = Path("/dev/shm")) -> None:
    """Removes such files of this user that no process on this machine has open or mapped."""
    old = time.time() - _SETTLED_S
    found = {}
    for pattern in _PATTERNS:
        for file in folder.glob(pattern):
            with suppress(OSError):  # another start removed it
                facts = file.stat()
                if facts.st_uid == os.getuid() and facts.st_mtime < old:
                    found[str(file)] = facts.st_size
    stale = found.keys() - _in_use(folder) if found else set()
    for name in stale:
        with suppress(OSError):
            os.unlink(name)
    if stale:
        size = sum(found[name] for name in stale) / 2**20
        logger.info("removed %d files (%.0f MiB) that killed engines left in %s", len(stale), size, folder)


def _in_use(folder: Path) -> set[str]:
    """Files of a folder that processes of this user have open or mapped."""
    found: set[str] = set()
    for process in os.scandir("/proc"):
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it ended, or is another user's
            maps = Path(process.path, "maps").read_text(errors="replace")
            found |= {line.split(maxsplit=5)[-1] for line in maps.splitlines() if f" {folder}/" in line}
        with suppress(OSError):
            for one in os.scandir(f"{process.path}/fd"):
                with suppress(OSError):
                    found.add(os.readlink(one.path))
    return found
