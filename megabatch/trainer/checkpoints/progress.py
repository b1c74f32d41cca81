"""`trainer.json` of a checkpoint: where a run is, besides weights, optimizer and generators."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megabatch.errors import CheckpointError
from megabatch.plan.layout import Layout
from megabatch.saved.history import TRAINER
from megabatch.saved.manifest import MANIFEST, DamagedError, Manifest, read_file, read_manifest


@dataclass(frozen=True, slots=True)
class Progress:
    """Everything that determines a run's next step, besides weights, optimizer and generators."""

    step: int = 0
    """Optimizer steps done."""
    cursor: Mapping[str, Any] = field(default_factory=dict)
    """Where the steps resume, as JSON that belongs to the task (`steps.State`)."""
    tokens: int = 0
    """Tokens trained on so far, without padding."""
    samples: int = 0
    skipped: int = 0
    """How many of the steps changed no parameter: fp16 gradients overflowed, or a guard skipped the update."""
    loss_scale: Mapping[str, float] | None = None
    """State of the fp16 loss scale (`LossScale.state`)."""
    epoch: float = 0.0
    """Passes over the data."""
    ended_epoch: int = 0
    """The number of the epoch that ended with this step; 0 if none did."""
    best: Mapping[str, float] | None = None
    """Step and value of the best evaluation so far, by `metric_for_best_model`."""
    seconds: float = 0.0
    """Wall-clock time of these steps. A step repeated after a resume counts once, with its last time."""
    recent: Sequence[Any] = ()
    """Loss and gradient norm of the last steps, as many as the guard compares with."""

    @property
    def updates(self) -> int:
        """Optimizer steps that changed parameters."""
        return self.step - self.skipped


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint, opened but not loaded yet."""

    path: Path
    progress: Progress
    generators_of: dict[str, Any] | None
    """The layout that saved the generators."""
    manifest: Manifest | None
    """None for a checkpoint saved before there were digests."""
    run: str | None = None
    """The run that saved it (`saved.history.id_of`)."""


def progress_text(progress: Progress, *, generators_of: Layout | None, run: str | None = None) -> str:
    """The text of `trainer.json`. It names the manifest: else a lost manifest would look like an old checkpoint.

    Args: run: `saved.history.id_of`.
    """
    layout = None if generators_of is None else asdict(generators_of)
    state = {**asdict(progress), "cursor": dict(progress.cursor), "generators_of": layout, "manifest": MANIFEST}
    state |= {} if run is None else {"run": run}
    return json.dumps(state, indent=2) + "\n"


def open_saved(checkpoint: Path) -> Saved:
    """Reads manifest and progress. Raises: DamagedError; CheckpointError if the folder is not a checkpoint."""
    manifest = read_manifest(checkpoint)
    path = checkpoint / TRAINER
    try:
        raw = read_file(path, TRAINER)
    except FileNotFoundError as e:
        if manifest is None and not checkpoint.name.startswith("step_"):
            raise CheckpointError(f"{path} cannot be read ({e}); give the folder of a checkpoint, step_*") from e
        raise DamagedError(f"{TRAINER}: is missing") from e
    except NotADirectoryError as e:
        raise CheckpointError(f"{path} cannot be read ({e}); give the folder of a checkpoint, step_*") from e
    if manifest is not None:
        manifest.require(TRAINER, raw)
    try:
        state = json.loads(raw)
        named, generators_of, run = state.pop("manifest", None), state.pop("generators_of"), state.pop("run", None)
        progress = Progress(**state)
        if not isinstance(progress.cursor, dict):
            raise TypeError(f"cursor is {progress.cursor!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DamagedError(f"{TRAINER}: is not valid ({e})") from e
    if named is not None and manifest is None:
        raise DamagedError(f"{named}: is missing")
    return Saved(checkpoint, progress, generators_of, manifest, run)
