"""Checkpoints of a run: complete or absent, and exact to resume from.

`checkpoints/step_00000100/` holds `trainer.json` (step, data cursor, layout), `mcore/` (torch_dist: model, optimizer,
generators) and `hf/` (safetensors that transformers loads). It is written under a temporary name, synced and renamed;
then `latest` is replaced.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megabatch.converters.mapping import Mapped
from megabatch.errors import CheckpointError, MegabatchError
from megabatch.plan.layout import Layout
from megabatch.run_directory import RunDirectory, write_atomic
from megabatch.trainer import torch_dist
from megabatch.trainer.data.schedule import Cursor
from megabatch.trainer.engine import Engine
from megabatch.trainer.hf_export import HfExport
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import parameters_norm

logger = logging.getLogger(__name__)

TRAINER, MCORE, HF = "trainer.json", "mcore", "hf"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: all that decides its next step, besides weights, optimizer and generators."""

    step: int = 0
    """Optimizer steps done."""
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    """Tokens trained on so far, without padding."""
    samples: int = 0
    seconds: float = 0.0
    """Wall-clock time of these steps: a step that a resume takes again counts once, as it was taken last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is saved and what is kept."""

    no_save_optim: bool = False
    no_save_rng: bool = False
    save_retain_interval: int | None = None
    save_total_limit: int | None = None


class _LeftAloneError(CheckpointError):
    """This rank failed while the others wait for it inside megatron-core: it can tell them only by leaving."""


class Checkpoints:
    """Saves to and restores from one run directory; every method is collective."""

    def __init__(
        self,
        run: RunDirectory,
        ranks: Ranks,
        layout: Layout,
        *,
        retention: Retention,
        table: Sequence[Mapped],
        export: HfExport | None,
    ) -> None:
        """`export` writes the Hugging Face folder; None writes none."""
        self.run, self.ranks, self.layout = run, ranks, layout
        self.retention, self.table, self.export = retention, table, export
        if ranks.is_main:
            for leftover in run.checkpoints.glob(".*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint of this run that can be resumed from."""

        def find() -> Path | None:
            found = sorted(self.run.checkpoints.glob("step_*"), reverse=True)
            return next((path for path in found if (path / MCORE).is_dir() and (path / TRAINER).is_file()), None)

        return self.ranks.on_main(find)

    def save(self, engine: Engine, progress: Progress, *, must_resume: bool = False) -> Path:
        """Writes the checkpoint of a step.

        Args: must_resume: optimizer and generators are saved even with `no_save_optim`, for a run that stops to be
        requeued.
        Raises: CheckpointError on every rank, with nothing left behind, if any rank could not write.
        """
        target = self.run.step(progress.step)
        temporary = target.with_name(f".{target.name}.tmp")
        self.ranks.on_main(lambda: self._begin(temporary))
        try:
            if self.export is not None:
                self.export.save(engine.model, self.ranks, temporary / HF)
            if must_resume or not self.retention.no_save_optim:
                self._save_state(engine, temporary / MCORE)
            self.ranks.on_main(lambda: self._commit(temporary, target, progress))
        except MegabatchError as e:
            if not isinstance(e, _LeftAloneError):
                self.ranks.barrier()
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"the checkpoint of step {progress.step} was not saved: {e}") from e
        if self.ranks.is_main:
            self._forget(progress.step)
        return target

    def _begin(self, temporary: Path) -> None:
        self._require_newest_start()
        _fresh(temporary)

    def _save_state(self, engine: Engine, directory: Path) -> None:
        error: MegabatchError | None = None
        try:
            torch_dist.save(engine, directory, optimizer=True, rng=not self.retention.no_save_rng)
        except CheckpointException as e:  # no Exception, but word to every rank that some failed; one is told why
            for failure, _ in e.failures.values():
                error = CheckpointError(f"{directory}: {_root_cause(failure)}; {_room(directory)}")
        except Exception as e:  # megatron-core and torch wrap a full disk in exceptions of their own
            logger.debug("saving %s", directory, exc_info=True)
            raise _LeftAloneError(f"{directory}: {_root_cause(e)}; {_room(directory)}") from e
        self.ranks.raise_together(error)

    def _require_newest_start(self) -> None:
        """A start whose node Slurm gave up may live on beside the one that took over: it must not touch the run."""
        jobs = self.run.jobs
        starts = jobs.read_text(encoding="utf-8", errors="replace").count('"start"') if jobs.exists() else 0
        if starts > self.ranks.place.restart + 1:
            raise CheckpointError(
                f"restart {starts - 1} has taken over this run; restart {self.ranks.place.restart} ends"
            )

    def _commit(self, temporary: Path, target: Path, progress: Progress) -> None:
        self._require_newest_start()
        try:
            generators = None if self.retention.no_save_rng else asdict(self.layout)
            state = {**asdict(progress), "cursor": progress.cursor.to_json(), "generators_of": generators}
            write_atomic(temporary / TRAINER, json.dumps(state, indent=2) + "\n")
            _sync_tree(temporary)
            earlier = target.with_name(f".{target.name}.earlier.tmp")
            if target.exists():
                os.replace(target, earlier)
            os.replace(temporary, target)
            _sync(target.parent)
            write_atomic(self.run.latest, target.name + "\n")
            shutil.rmtree(earlier, ignore_errors=True)
        except OSError as e:
            raise CheckpointError(f"{target}: {e.strerror or e}; {_room(temporary)}") from e

    def _forget(self, step: int) -> None:
        """Deletes what `save_retain_interval` and `save_total_limit` do not keep; never the newest."""
        older = [p for p in sorted(self.run.checkpoints.glob("step_*")) if _step_of(p) < step]
        keep_every, keep_last = self.retention.save_retain_interval, self.retention.save_total_limit
        doomed = [p for p in older if keep_every is not None and _step_of(p) % keep_every]
        if keep_last is not None:
            kept = [p for p in older if p not in doomed]
            doomed += kept[: max(0, len(kept) + 1 - keep_last)]
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)

    def parameters_norm(self, engine: Engine) -> float:
        """L2 norm of all parameters."""
        return parameters_norm(engine.model, self.table, self.ranks)

    def restore_weights(self, engine: Engine, folder: Path) -> None:
        """Loads the weights alone: of a checkpoint of ours, or of a torch_dist folder of megatron-core's."""
        self._load(engine, folder / MCORE if (folder / MCORE).is_dir() else folder, step=None, rng=False)

    def restore(self, engine: Engine, checkpoint: Path, *, optimizer: bool = True, rng: bool = True) -> Progress:
        """Loads a checkpoint of this or another run and says how far it was.

        Generators are taken over only by the layout that saved them.
        Raises: CheckpointError naming the file.
        """
        progress, generators_of = self.ranks.on_main(lambda: read_progress(checkpoint))
        same = generators_of == asdict(self.layout)
        if rng and not same:
            logger.info("%s has no random generators of this layout: they begin anew", checkpoint)
        self._load(engine, checkpoint / MCORE, step=progress.step if optimizer else None, rng=rng and same)
        if engine.optimizer is not None and optimizer:
            engine.optimizer.advance(progress.step)
        return progress

    def _load(self, engine: Engine, folder: Path, *, step: int | None, rng: bool) -> None:
        try:
            torch_dist.load(engine, folder, step=step, rng=rng)
        except MegabatchError:
            raise
        except CheckpointException as e:  # no Exception either
            failure, _ = next(iter(e.failures.values()))
            raise CheckpointError(f"{folder} cannot be loaded: {_root_cause(failure)}") from e
        except Exception as e:  # megatron-core and torch raise many kinds for damaged files
            raise CheckpointError(f"{folder} cannot be loaded: {_root_cause(e)}") from e


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, Any] | None]:
    """What `trainer.json` says: progress, and the layout whose generators were saved. Raises: CheckpointError."""
    path = checkpoint / TRAINER
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        generators_of = state.pop("generators_of")
        return Progress(**{**state, "cursor": Cursor.from_json(state["cursor"])}), generators_of
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); give the folder of a checkpoint, step_*") from e


def _fresh(temporary: Path) -> None:
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in (MCORE, HF):
            (temporary / name).mkdir(parents=True)
    except OSError as e:
        raise CheckpointError(f"{temporary}: {e.strerror or e}") from e


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _sync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()  # the part that this checkpoint does without
        else:
            _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _root_cause(error: BaseException) -> str:
    """The first line of the exception that started it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Weights only load failed"):  # torch goes on to advise loading it all the same
        return "an object in it is more than data: loading it could run code"
    return lines[0] if lines else type(error).__name__


def _room(folder: Path) -> str:
    free = shutil.disk_usage(folder).free / 2**20
    return f"{free:.0f} MiB are free there; if that is too little, save elsewhere or set checkpoint.save_total_limit"
