"""What `--dry_run` prints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from megabatch.converters.engine.plan import Plan, Tensor


def show_plan(plan: Plan, output: str) -> None:
    """Prints totals and the disk needed, the skipped tensors, then every file and tensor of a plan with its bytes."""
    for line in _lines(plan, output):
        print(line)


def _lines(plan: Plan, output: str) -> Iterator[str]:
    moved = sum(tensor.data_bytes for tensor in plan.tensors if tensor.is_moved)
    whole = sum(tensor.data_bytes for tensor in plan.tensors)
    yield f"{len(plan.tensors)} tensors of {whole} bytes, {moved} of them copied unchanged; plan {plan.digest}"
    yield f"from {plan.source} ({len(plan.sources)} files) to {output}: {_disk(plan, output)}"
    yield from left_aside(plan.ignored)
    yield from (f"note: {note}" for note in plan.notes)
    by_file: list[list[Tensor]] = [[] for _ in plan.files]
    for tensor in plan.tensors:
        by_file[tensor.file].append(tensor)
    for file, tensors in zip(plan.files, by_file, strict=True):
        yield f"{file.name}: {file.size} bytes, {len(tensors)} tensors"
        for tensor in tensors:
            place = f"{tensor.data_offset:>14} {tensor.data_bytes:>13} B"
            yield f"  {place}  {tensor.name} {list(tensor.shape)} {_how(plan, tensor)}"


def left_aside(ignored: Mapping[str, str]) -> Iterator[str]:
    """One line for skipped tensors with the same reason whose names differ only in numbers."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in ignored.items():
        groups.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    for (pattern, reason), names in groups.items():
        yield f"skipped: {names[0] if len(names) == 1 else f'{pattern} ({len(names)} tensors)'}: {reason}"


def _how(plan: Plan, tensor: Tensor) -> str:
    files = sorted({plan.sources[strip.source].path.name for strip in tensor.strips})
    way = tensor.dtype if tensor.dtype == tensor.source_dtype else f"{tensor.source_dtype} to {tensor.dtype}"
    if tensor.add:
        way += f", {tensor.add:+g}"
    if tensor.arrangement is not None:
        way += ", rearranged"
    if tensor.low_rank:
        ranks = dict.fromkeys(str(term.right.shape[0]) for term in tensor.low_rank)
        way += f", merged with adapters of rank {', '.join(ranks)}"
    if tensor.blocks is not None:
        way += f", {tensor.blocks.makes} of blocks of {tensor.blocks.height} x {tensor.blocks.width}"
    extents = f"{len(tensor.strips)} extent{'s' if len(tensor.strips) != 1 else ''}"
    return f"{way}: {extents} of {', '.join(files)}"


def _disk(plan: Plan, output: str) -> str:
    parent = Path(os.path.abspath(output)).parent
    while not parent.exists():
        parent = parent.parent
    return f"{plan.bytes_needed} bytes of disk space are needed, {shutil.disk_usage(parent).free} are free"
