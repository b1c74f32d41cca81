"""Checkpoints of a run: complete or absent, and exact to resume from.

`checkpoints/step_00000100/` holds `trainer.json` (step, data cursor, layout), `mcore/` (torch_dist: model, optimizer,
generators), `hf/` (safetensors that transformers loads) and `megabatch-manifest.json` (digests of all files). We write
it under a temporary name, sync it, replace `latest`, and rename it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megabatch.converters.adapters.config import NAME as ADAPTER_CONFIG
from megabatch.converters.mapping import Mapped
from megabatch.errors import CheckpointError, ElsewhereError, MegabatchError
from megabatch.plan.layout import Layout
from megabatch.run_directory import RunDirectory
from megabatch.saved import history
from megabatch.saved.history import HF, MCORE, TRAINER
from megabatch.saved.manifest import DamagedError, File, Manifest, UnreadableError, missing_or_resized, read_file
from megabatch.trainer.checkpoints import commit, torch_dist, writing
from megabatch.trainer.checkpoints.background import Background
from megabatch.trainer.checkpoints.commit import Retention
from megabatch.trainer.checkpoints.progress import Progress, Saved, open_saved, progress_text
from megabatch.trainer.checkpoints.reading import SMALL
from megabatch.trainer.engine import Engine
from megabatch.trainer.exports.export import Export
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import parameters_norm

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """This rank's part of a checkpoint, as written."""

    hf: dict[str, File]
    mcore: writing.Written


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A checkpoint being written in the background, while training goes on."""

    progress: Progress
    temporary: Path
    planned: writing.Plan | None
    """None if it saves no state to resume from."""
    background: Background[Part]


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
        export: Export | None,
        adapter_config: str | None = None,
        each_once: bool = False,
    ) -> None:
        """`export` writes the folder `hf/`, which other software loads; None writes none. `adapter_config` is saved
        beside adapters, so that the converters know their ranks and scales. `each_once`: of the ranks that need the
        same bytes, one reads them and sends them to the others.
        """
        self.run, self.ranks, self.layout = run, ranks, layout
        self.retention, self.table, self.export = retention, table, export
        self._under_way: UnderWay | None = None
        self.has_generators = False
        """Whether the random generators are those of a checkpoint."""
        self.adapter_config, self.each_once = adapter_config, each_once
        if ranks.is_main:
            for leftover in run.checkpoints.glob(".*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, engine: Engine, progress: Progress, *, must_resume: bool = False, with_hf: bool = True) -> Path:
        """Writes the checkpoint of a step, after finishing the one under way.

        Args: must_resume: save optimizer and generators even with `no_save_optim`, for a run that stops to be
        requeued; with_hf: also write `hf/`, if this run exports it.
        Raises: CheckpointError on every rank, with nothing left behind, if any rank could not write.
        """
        self.finish()
        with self._new(progress) as temporary:
            files: dict[str, File] = {}
            if self.export is not None and with_hf:
                files |= _below(HF, self.export.save(engine.model, self.ranks, temporary / HF))
            if must_resume or not self.retention.no_save_optim:
                rng = not self.retention.no_save_rng
                files |= _below(MCORE, torch_dist.save(engine, temporary / MCORE, optimizer=True, rng=rng))
            return self._commit(temporary, progress, files)

    def begin(self, engine: Engine, progress: Progress, *, with_hf: bool = True) -> None:
        """Copies the state of a step and starts writing it in the background; `finish` commits it.

        Finishes the checkpoint under way first. Raises: CheckpointError like `save`.
        """
        self.finish()
        with self._new(progress) as temporary:
            write_hf = self.export.copied(engine.model, self.ranks) if self.export is not None and with_hf else None
            planned, items = None, []
            if not self.retention.no_save_optim:
                planned = torch_dist.plan_save(engine, optimizer=True, rng=not self.retention.no_save_rng)
                items = writing.copied(writing.items(planned))

            def write() -> Part:
                hf = {} if write_hf is None else write_hf(temporary / HF)
                return Part(hf, writing.write_items(items, temporary / MCORE, rank=self.ranks.rank))

            self._under_way = UnderWay(progress, temporary, planned, Background(write))

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint in the background."""
        return self._under_way is not None and self._under_way.background.running

    @property
    def under_way(self) -> bool:
        """Whether there is a checkpoint to finish; the same on every rank."""
        return self._under_way is not None

    def finish(self) -> Path | None:
        """Waits for the checkpoint under way, if there is one, and commits it.

        Raises: CheckpointError on every rank, with nothing left behind, if any rank could not write.
        """
        found, self._under_way = self._under_way, None
        if found is None:
            return None
        with self._cleaned_up(found.temporary, found.progress.step):
            part, error = found.background.result()
            self.ranks.raise_together(error)
            assert part is not None, "no error, so it was written"
            files = _below(HF, part.hf)
            if found.planned is not None:
                mcore = torch_dist.complete(found.planned, found.temporary / MCORE, part.mcore, self.ranks)
                files |= _below(MCORE, mcore)
            return self._commit(found.temporary, found.progress, files)

    @contextmanager
    def _new(self, progress: Progress) -> Iterator[Path]:
        """Creates a temporary folder for the checkpoint of a step; deletes it on an error."""
        temporary = commit.temporary_of(self.run.step(progress.step))

        def begin() -> None:
            self._require_newest_start()
            commit.begin(temporary)

        self.ranks.on_main(begin)
        with self._cleaned_up(temporary, progress.step):
            yield temporary

    @contextmanager
    def _cleaned_up(self, temporary: Path, step: int) -> Iterator[None]:
        try:
            yield
        except MegabatchError as e:
            self.ranks.barrier()
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"the checkpoint of step {step} was not saved: {e}; {commit.room(self.run)}") from e

    def _commit(self, temporary: Path, progress: Progress, files: dict[str, File]) -> Path:
        """Commits what all ranks wrote as a checkpoint of the run; collective. Args: files: this rank's."""
        target = self.run.step(progress.step)
        everyone = self.ranks.gather_on_main(files)

        def on_main() -> None:
            self._require_newest_start()
            layout = None if self.retention.no_save_rng else self.layout
            texts = {TRAINER: progress_text(progress, generators_of=layout, run=history.id_of(self.run))}
            found = {name: file for part in everyone or [] for name, file in part.items()}
            if self.adapter_config is not None and any(name.startswith(f"{MCORE}/") for name in found):
                texts[f"{MCORE}/{ADAPTER_CONFIG}"] = self.adapter_config
            commit.commit(self.run, temporary, target, found, texts=texts)
            self._point_to_best(progress)

        self.ranks.on_main(on_main)
        if self.ranks.is_main:
            commit.forget(self.run, progress.step, self.retention)
        return target

    def _require_newest_start(self) -> None:
        """Refuses to write if a newer attempt has started: Slurm may requeue a run while its lost node still runs."""
        jobs = self.run.jobs
        starts = jobs.read_text(encoding="utf-8", errors="replace").count('"start"') if jobs.exists() else 0
        if starts > self.ranks.place.attempt + 1:
            raise CheckpointError(
                f"attempt {starts - 1} has taken over this run; attempt {self.ranks.place.attempt} ends"
            )

    def parameters_norm(self, engine: Engine) -> float:
        """L2 norm of all parameters."""
        return parameters_norm(engine.model, self.table, self.ranks)

    def latest(self) -> Path | None:
        """The checkpoint from which this run would resume, unless it turns out damaged."""
        usable = self.ranks.on_main(lambda: history.candidates(self.run).usable)
        return usable[0] if usable else None

    def resume(self, engine: Engine) -> Progress | None:
        """Resumes from the checkpoint that `latest` names, or from the newest before it that is whole and readable.

        Once one is loaded, sets aside the damaged ones, and those of a history that the run has abandoned. One that
        cannot be read stays as it is: the next attempt, maybe on another node, tries it again.
        Returns: None for a run without checkpoints.
        Raises: CheckpointError, changing nothing, when there is none to resume from.
        """
        found = self.ranks.on_main(lambda: history.candidates(self.run))
        damaged: list[tuple[Path, str]] = []
        unreadable: list[tuple[Path, str]] = []
        for path in found.usable:
            logger.info("resuming from %s", path)
            try:
                progress = self._restore(engine, path, is_own=True)
            except MegabatchError as e:
                cause = _cause(e)
                if isinstance(cause, DamagedError):
                    damaged.append((path, str(cause)))
                elif isinstance(cause, UnreadableError):
                    unreadable.append((path, str(cause)))
                else:
                    raise
                continue
            self.ranks.on_main(partial(self._settle, path, damaged, found.later, unreadable, progress))
            return progress
        which = "; ".join(f"{path.name}: {fault}" for path, fault in (*unreadable, *damaged))
        if unreadable:
            raise CheckpointError(
                f"{self.run.checkpoints}: no checkpoint can be read here, and nothing was changed or set aside "
                f"({which}). Resume where the disk and its permissions let it be read"
            )
        if damaged:
            raise CheckpointError(
                f"{self.run.checkpoints}: every checkpoint is damaged, and nothing was changed or set aside "
                f"({which}). Put back an intact copy of one, or move the folder away to start over"
            )
        return None

    def _settle(
        self,
        chosen: Path,
        damaged: Sequence[tuple[Path, str]],
        later: Sequence[Path],
        unreadable: Sequence[tuple[Path, str]],
        progress: Progress,
    ) -> None:
        """Makes the loaded checkpoint the run's newest of those that can be read. Args: progress: that of this
        checkpoint."""
        for path, fault in unreadable:
            logger.warning(
                "%s (%s): it is left for the next attempt to try, and this one goes on from %s",
                path.name,
                fault,
                chosen.name,
            )
        if damaged or later or history.named_by_latest(self.run) != chosen:
            self._require_newest_start()
            try:
                for note in history.settle(self.run, chosen, damaged, later, point=not unreadable):
                    logger.warning("%s", note.describe())
            except OSError as e:
                raise CheckpointError(f"{self.run.checkpoints} cannot be written: {e.strerror or e}") from e
        self._point_to_best(progress)  # also where a kill came between `latest` and `best`

    def _point_to_best(self, progress: Progress) -> None:
        try:
            history.point_to_best(self.run, None if progress.best is None else int(progress.best["step"]))
        except OSError as e:
            raise CheckpointError(f"{self.run.best} cannot be written: {e.strerror or e}") from e

    def restore_weights(self, engine: Engine, folder: Path) -> None:
        """Loads only the weights, from one of our checkpoints or from a torch_dist folder of megatron-core.

        Those of what follows the policy too where nothing is trained: training that begins with these weights has its
        own reference, and an evaluation measures what the checkpoint's run had.
        """
        following = engine.optimizer is None
        with self._weights_in(folder) as (inner, manifest):
            torch_dist.load(
                engine, inner, manifest, updates=None, rng=False, following=following, each_once=self.each_once
            )

    def restore_base(self, engine: Engine, folder: Path) -> None:
        """Loads only the base model under the adapters, from the same kinds of folder."""
        with self._weights_in(folder) as (inner, manifest):
            torch_dist.load_base(engine, inner, manifest, each_once=self.each_once)

    @contextmanager
    def _weights_in(self, folder: Path) -> Iterator[tuple[Path, Manifest | None]]:
        inner = folder / MCORE if (folder / MCORE).is_dir() else folder
        with _naming(folder):
            if (inner.parent / TRAINER).is_file():
                yield inner, self._opened(inner.parent).manifest
            else:
                logger.info("%s has no digests: loading it unchecked", folder)
                yield inner, None

    def restore(self, engine: Engine, checkpoint: Path, *, optimizer: bool = True, rng: bool = True) -> Progress:
        """Loads a checkpoint of this or another run and returns its progress.

        Restores random generators only in the layout that saved them.
        Raises: CheckpointError naming the file.
        """
        with _naming(checkpoint):
            return self._restore(engine, checkpoint, optimizer=optimizer, rng=rng)

    def _restore(
        self, engine: Engine, checkpoint: Path, *, optimizer: bool = True, rng: bool = True, is_own: bool = False
    ) -> Progress:
        """Args: is_own: it lies in this run's folder.

        Raises: CheckpointError; for damage, a DamagedError on at least one rank.
        """
        saved = self._opened(checkpoint, is_own=is_own)
        progress = saved.progress
        same = saved.generators_of == asdict(self.layout)
        if rng and not same:
            logger.info("%s has no random generators for this layout: they start over", checkpoint)
        updates = progress.updates if optimizer else None
        rng, inner = rng and same, checkpoint / MCORE
        torch_dist.load(
            engine, inner, saved.manifest, updates=updates, rng=rng, following=True, each_once=self.each_once
        )
        self.has_generators = rng
        if engine.optimizer is not None and optimizer:
            engine.optimizer.advance(progress.updates)
            if engine.optimizer.loss_scale is not None and progress.loss_scale is not None:
                engine.optimizer.loss_scale.restore(progress.loss_scale)
        return progress

    def _opened(self, checkpoint: Path, *, is_own: bool = False) -> Saved:
        """Opens a checkpoint. One rank checks names, sizes and small files; whoever loads the rest checks that."""

        def look() -> Saved:
            saved = open_saved(checkpoint)
            if (fault := history.misplaced(checkpoint, saved.progress.step)) is not None:
                raise DamagedError(fault)
            if is_own and (fault := history.of_another_run(saved.run, history.id_of(self.run))) is not None:
                raise DamagedError(fault)
            if saved.manifest is None:
                logger.warning("%s has no digests (it was saved before them): loading it unchecked", checkpoint)
                return saved
            for fault in missing_or_resized(saved.manifest, saved.manifest.below(MCORE)):
                raise DamagedError(fault)
            for name in SMALL:
                inner = f"{MCORE}/{name}"
                saved.manifest.require(inner, read_file(checkpoint / inner, inner))
            return saved

        return self.ranks.on_main(look)


def _cause(error: MegabatchError) -> MegabatchError:
    """The error of the rank that failed."""
    return error.error if isinstance(error, ElsewhereError) else error


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """Names the damaged checkpoint in the error, where no other can replace it."""
    try:
        yield
    except MegabatchError as e:
        if not isinstance(damage := _cause(e), DamagedError):
            raise
        raise CheckpointError(f"{checkpoint} is damaged: {damage}; load an older one, step_*") from e


def _below(part: str, files: dict[str, File]) -> dict[str, File]:
    return {f"{part}/{name}": file for name, file in files.items()}
