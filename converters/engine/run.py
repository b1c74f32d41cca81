"""Runs a plan to an output with its final name: checks, shares, executes, verifies, commits; or resumes
all that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megabatch.converters.engine.commit import commit
from megabatch.converters.engine.execute import execute, share, unwritable
from megabatch.converters.engine.journal import ALONE, Journal, Place, Staged
from megabatch.converters.engine.manifest import is_of
from megabatch.converters.engine.plan import Plan
from megabatch.converters.engine.source_digests import check_sources
from megabatch.converters.engine.verify import compare
from megabatch.errors import ConversionError
from megabatch.values import dataclass

Say = Callable[[str, int], None]
"""Called with what was done (`written`, `verified`) and the bytes of each tensor."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The work of one rank."""

    written: int
    """Bytes of tensors that it wrote."""
    resumed: int
    """Bytes of its share that an earlier run had written."""
    committed: bool
    """Whether the output has its final name; if not, other ranks are still working."""


def run(
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    workers: int = 2,
    place: Place = ALONE,
    exist_ok: bool = False,
    resume: bool = False,
    verify: bool = False,
    say: Say = lambda what, size: None,
) -> Outcome:
    """Executes this rank's share of a plan; the last rank to finish renames the output.

    Args: exist_ok: an output that exists is replaced, in one instant, when the new one is complete. resume: takes up
    what an interrupted run left in `.NAME.partial` beside the output, and leaves an output of this plan as it is,
    unless its replacement (exist_ok) was interrupted. Without it such an output is an older one for any rank: no other
    does this one's share. verify: compares every byte with its source before the output gets its name, and writes
    digests into its manifest.
    Raises: ConversionError; what was done until then stays in `.NAME.partial`.
    """
    rank, world, _ = place
    if workers < 1 or not 0 <= rank < world:
        raise ConversionError(
            f"workers={workers} must be 1 or more, and rank={rank} count from 0 to world={world} - 1"
        )
    target = Path(os.path.abspath(output))
    if target == target.parent:
        raise ConversionError(f"{target}: is no folder that can be made; choose another output_dir")
    staged, mine = Staged(target), share(plan, rank=rank, world=world)
    try:
        if resume and is_of(target, plan) and (staged.named() or not exist_ok):
            staged.remove()
            if verify:
                compare(plan, mine, target, workers=workers, progress=lambda size: say("verified", size))
            return Outcome(0, sum(plan.tensors[number].data_bytes for number in mine), True)
        if not mine and world > 1:
            return Outcome(0, 0, False)  # there are more ranks than tensors
        check_output(target, exist_ok=exist_ok)
        _check_apart(plan, target)
        _check_disk(plan, staged)
        if verify:
            check_sources(plan, mine, workers=workers)
        staged.open(plan, place, resume=resume)
        try:
            return _finish(plan, staged, mine, place, workers=workers, verify=verify, say=say)
        except BaseException:
            if world == 1 and not staged.done(plan):
                staged.remove()  # there is nothing to resume
            raise
    except OSError as error:
        raise unwritable(target, plan, error) from error


def _finish(
    plan: Plan, staged: Staged, mine: list[int], place: Place, *, workers: int, verify: bool, say: Say
) -> Outcome:
    done = staged.done(plan)
    left = [number for number in mine if number not in done]
    with Journal(staged, plan, place) as journal:
        execute(plan, left, staged.files, journal, workers=workers, progress=lambda size: say("written", size))
        if verify:
            unverified = [number for number in mine if not done.get(number)]
            hashes = compare(
                plan, unverified, staged.files, workers=workers, progress=lambda size: say("verified", size)
            )
            journal.add(unverified, hashes)
    written = sum(plan.tensors[number].data_bytes for number in left)
    resumed = sum(plan.tensors[number].data_bytes for number in mine) - written
    everything = staged.done(plan)
    complete = len(everything) == len(plan.tensors) and (not verify or all(everything.values()))
    if complete:
        commit(plan, staged, everything, world=place.world)
    return Outcome(written, resumed, complete or staged.named())


def check_output(target: Path, *, exist_ok: bool) -> None:
    """Raises: ConversionError when `target` exists and may not be replaced."""
    if target.is_symlink() and not target.exists():
        raise ConversionError(f"{target}: is a link to {os.readlink(target)}, which is not there; remove the link")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise ConversionError(f"{target}: exists and is no folder; choose another output_dir")
    if not exist_ok:
        raise ConversionError(
            f"{target}: exists and is not empty; choose another output_dir, or replace it with --exist_ok"
        )


def _check_apart(plan: Plan, target: Path) -> None:
    """Raises: ConversionError when the output would replace its own source."""
    place = target.resolve()
    read = [source.path for source in plan.sources] + (
        [plan.auxiliary.folder / "config.json"] if plan.auxiliary else []
    )
    for path in read:
        if place in path.resolve().parents:
            raise ConversionError(f"{target}: {path} is in it, from which it is to be made; choose another output_dir")


def _check_disk(plan: Plan, staged: Staged) -> None:
    """Raises: ConversionError when the disk cannot hold the bytes still to write."""
    parent = staged.output.parent
    while not parent.exists():
        parent = parent.parent
    there = sum(path.stat().st_blocks * 512 for path in staged.files.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free
    if free + there < plan.bytes_needed:
        raise ConversionError(
            f"{staged.output}: disk full: {plan.bytes_needed} bytes are needed, {free} are free"
            + (f" and {there} written" if there else "")
        )
