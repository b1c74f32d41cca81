"""Which files of killed engines a start removes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from megabatch.rollout.vllm.leftovers import remove_leftovers


def test_files_that_nothing_uses_are_removed(tmp_path: Path) -> None:
    names = ("psm_dead", "psm_open", "psm_mapped", "ident-tp:0-[0-1]-cpushm0", "psm_young", "something_else")
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 4096)
    for name in set(names) - {"psm_young"}:
        os.utime(tmp_path / name, (1, 1))
    with open(tmp_path / "psm_open", "rb"), open(tmp_path / "psm_mapped", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with open(tmp_path / "psm_open", "rb"):
        remove_leftovers(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    mapped.close()
    assert left == {"psm_open", "psm_mapped", "psm_young", "something_else"}
