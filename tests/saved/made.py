"""Checkpoints with a manifest, made of a few bytes, for what reads them at rest."""

from __future__ import annotations

import random
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from megabatch.run_directory import RunDirectory
from megabatch.saved.manifest import MANIFEST, File, Range, manifest_text

PARTS = (100, 0, 7, 3000)
"""Sizes of the items of each .distcp."""


def make_checkpoint(folder: Path, *, seed: int = 0, mcore: bool = True) -> Path:
    """A checkpoint of two ranks; digests come from xxhash itself."""
    rng, files = random.Random(seed), {}
    (folder / "hf").mkdir(parents=True)
    for name in ("trainer.json", "hf/config.json"):
        data = b'{"manifest": "megabatch-manifest.json"}' + rng.randbytes(20)
        (folder / name).write_bytes(data)
        files[name] = File.of(data)
    for rank in range(2 if mcore else 0):
        name, at, ranges, data = f"mcore/__{rank}_0.distcp", 0, [], b""
        for number, size in enumerate(PARTS):
            part = rng.randbytes(size)
            ranges.append(Range(f"tensor{number}", at, size, xxh3_64_hexdigest(part)))
            data, at = data + part, at + size
        (folder / "mcore").mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        files[name] = File(len(data), tuple(ranges))
    (folder / MANIFEST).write_text(manifest_text(files))
    return folder


def make_run(folder: Path, *steps: int) -> RunDirectory:
    """A run directory with these checkpoints, the last of which is the latest."""
    run = RunDirectory(folder)
    for step in steps:
        make_checkpoint(run.step(step), seed=step)
    run.run_json.write_text("{}")
    run.latest.write_text(f"{run.step(steps[-1]).name}\n")
    return run
