"""Saving, resuming and loading against plain writes and reads of the same bytes.

Run by `run.py`: python tests/bench/checkpoint.py FOLDER ANSWER
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from made_runs import SMALL, WEIGHTY, recipe, write_run
from measure import MIB, Figure, answer, bytes_below, median, peak_memory, read_plain, seconds, sized, write_plain

from megabatch.converters import atomic
from megabatch.converters.hf_model import open_hf_model
from megabatch.converters.safetensors_io import writer
from megabatch.saved.manifest import Manifest
from megabatch.trainer import assemble
from megabatch.trainer.activity import Activity
from megabatch.trainer.checkpoints import writing
from megabatch.trainer.checkpoints.checkpoints import Checkpoints
from megabatch.trainer.checkpoints.progress import Progress
from megabatch.trainer.engine import Engine
from megabatch.trainer.loop import open_loop
from megabatch.trainer.model_source import ModelSource, model_source
from megabatch.trainer.signals import StopSignal

TIMES = sized(3, 1)
BETWEEN = 50
"""Steps between two checkpoints of a run, the shortest that anybody saves at."""


def figures(folder: Path) -> list[Figure]:
    groups = {"batch": {"micro_batch_size": 1, "global_batch_size": 1}, "data": {"max_length": 128}}
    run = write_run(
        recipe(folder, sized(WEIGHTY, SMALL), checkpoint={"save_safetensors": True}, **groups), folder / "run"
    )
    with assemble.join_ranks(run) as ranks:
        loop, progress = open_loop(run, ranks, StopSignal(), Activity(0))
        engine, checkpoints = loop.engine, loop.checkpoints
        with loop.metrics:
            taken = loop.steps(progress)
            next(taken)  # gives Adam its state
            step_s = median([seconds(lambda: next(taken)) for _ in range(TIMES)])
        saved = _save(engine, checkpoints, folder)
        newest = checkpoints.latest()
        assert newest is not None
        beside = _beside(engine, checkpoints, step_s)
        restored = _restore(engine, checkpoints, newest)
        digests = _digests(engine, checkpoints, newest)
        return [*saved, *beside, *restored, *digests, *_load(engine, model_source(run, ranks), newest / "hf")]


def _save(engine: Engine, checkpoints: Checkpoints, folder: Path) -> list[Figure]:
    """A whole checkpoint, with optimizer state and Hugging Face folder; saves and plain writes take turns."""
    ours, plain, peaks = [], [], []
    for step in range(1, TIMES + 1):
        with peak_memory() as peak:
            ours.append(seconds(lambda step=step: checkpoints.save(engine, Progress(step=step))))  # type: ignore[misc]
        peaks.append(peak.mib)
        size = bytes_below(checkpoints.run.step(step))
        plain.append(write_plain(folder / "plain", size))
        if step < TIMES:
            shutil.rmtree(checkpoints.run.step(step))
    return [
        _ratio("checkpoint save / plain write", ours, plain, f"{size / MIB:.0f} MiB written and synced"),
        Figure(name="checkpoint save, peak memory", value=max(peaks), unit="MiB", note="above the trainer's own"),
    ]


def _beside(engine: Engine, checkpoints: Checkpoints, step_s: float) -> list[Figure]:
    """How long training waits for a checkpoint that is written beside it, and for one that is not, in turns."""
    waited, saved = [], []
    for step in range(TIMES + 1, 2 * TIMES + 1):
        progress = Progress(step=step)
        begun = seconds(lambda progress=progress: checkpoints.begin(engine, progress))  # type: ignore[misc]
        while checkpoints.writing:
            time.sleep(0.01)
        waited.append(begun + seconds(checkpoints.finish))
        shutil.rmtree(checkpoints.run.step(step))
        saved.append(seconds(lambda progress=progress: checkpoints.save(engine, progress)))  # type: ignore[misc]
        shutil.rmtree(checkpoints.run.step(step))
    between = BETWEEN * step_s
    return [
        _ratio("checkpoint beside training, wait / save", waited, saved, "the copy, and the commit"),
        Figure(
            name="checkpoint beside training, wait / interval",
            value=median(waited) / (between + median(waited)),
            unit="x",
            target=0.05,
            note=f"{median(waited):.2f} s every {BETWEEN} steps of {step_s:.2f} s",
        ),
    ]


def _restore(engine: Engine, checkpoints: Checkpoints, saved: Path) -> list[Figure]:
    ours, plain = [], []
    for _ in range(TIMES):
        ours.append(seconds(lambda: checkpoints.restore(engine, saved)))
        plain.append(read_plain(saved / "mcore"))
    note = f"{bytes_below(saved / 'mcore') / MIB:.0f} MiB from the file cache"
    return [_ratio("checkpoint restore / plain read", ours, plain, note)]


def _digests(engine: Engine, checkpoints: Checkpoints, saved: Path) -> list[Figure]:
    """What checking costs: the same saves and loads with digests and without, in turns."""
    step = Progress(step=TIMES + 1)

    def save() -> None:
        shutil.rmtree(checkpoints.run.step(step.step), ignore_errors=True)
        checkpoints.save(engine, step)

    def restore() -> None:
        checkpoints.restore(engine, saved)

    as_torch_saves = (writing, "_without_archive_checksums", nullcontext)
    with_torchs, bare = _taken_in_turns(save, [as_torch_saves]), _taken_in_turns(save, [])
    loads = _taken_in_turns(restore, [])
    shutil.rmtree(checkpoints.run.step(step.step))
    return [
        _ratio(
            "checkpoint save, digests / none", *with_torchs, "none has the checksums of torch.save's archives", 1.1
        ),
        _ratio("checkpoint save, digests / no checksum", *bare, "beside one without any"),
        _ratio("checkpoint restore, digests / none", *loads, "from the file cache", 1.1),
    ]


def _taken_in_turns(work: Callable[[], None], more: list[Any]) -> tuple[list[float], list[float]]:
    """Processor seconds with digests and without, `more` being replaced besides."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(sized(2 * TIMES, 1)):
        for without in (number % 2, 1 - number % 2):
            replaced = [*_UNDIGESTED, *more] if without else []
            with ExitStack() as stack:
                for owner, name, value in replaced:
                    stack.enter_context(patch.object(owner, name, value))
                started = time.process_time()
                work()
                taken[without].append(time.process_time() - started)
    return taken


class _NoDigest:
    def update(self, data: object) -> None: ...

    def hexdigest(self) -> str:
        return ""


_UNDIGESTED = [
    *((module, "xxh3_64", _NoDigest) for module in (writing, atomic, writer)),
    (Manifest, "digest", lambda _: _NoDigest()),
    (Manifest, "require_digest", lambda *_: None),
]


def _load(engine: Engine, source: ModelSource, hf: Path) -> list[Figure]:
    """The model alone from its Hugging Face folder, as a fresh run starts."""
    ours, plain, peaks = [], [], []
    for _ in range(TIMES):
        with peak_memory() as peak:
            ours.append(seconds(lambda: _open(source, hf).load(engine.model, engine.ranks)))
        peaks.append(peak.mib)
        plain.append(read_plain(hf))
    return [
        _ratio("model load / plain read", ours, plain, f"{bytes_below(hf) / MIB:.0f} MiB from the file cache"),
        Figure(name="model load, peak memory", value=max(peaks), unit="MiB", note="mapped file pages included"),
    ]


def _open(source: ModelSource, hf: Path) -> ModelSource:
    return ModelSource(source.family, hf, source.tokenizer, open_hf_model(hf))


def _ratio(name: str, ours: list[float], plain: list[float], note: str, target: float | None = None) -> Figure:
    ratio = median([o / p for o, p in zip(ours, plain, strict=True)])
    note = f"{median(ours):.2f} s / {median(plain):.2f} s; {note}"
    return Figure(name=name, value=ratio, unit="x", target=target, note=note)


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(figures(Path(sys.argv[1])), sys.argv[2])
