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
from megabatch.saved.manifest import MANIFEST, DamagedError, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: all that decides its next step, besides weights, optimizer and generators."""

    step: int = 0
    """Optimizer steps done."""
    cursor: Mapping[str, Any] = field(default_factory=dict)
    """Where its steps go on, as JSON of the task's own (`steps.State`)."""
    tokens: int = 0
    """Tokens trained on so far, without padding."""
    samples: int = 0
    skipped: int = 0
    """Steps among these that changed no parameter, because fp16's gradients overflowed, or by a guard."""
    loss_scale: Mapping[str, float] | None = None
    """State of fp16's loss scale (`LossScale.state`)."""
    epoch: float = 0.0
    """Passes over the data."""
    ended_epoch: int = 0
    """The number of the epoch that ended with this step; 0 where none did."""
    best: Mapping[str, float] | None = None
    """Step and value of the best evaluation so far, by `metric_for_best_model`."""
    seconds: float = 0.0
    """Wall-clock time of these steps: a step that a resume takes again counts once, as it was taken last."""
    recent: Sequence[Any] = ()
    """Loss and gradient norm of the last steps, as far as the guard compares new ones with them."""

    @property
    def updates(self) -> int:
        """Optimizer steps that changed parameters."""
        return self.step - self.skipped


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint before it is loaded."""

    path: Path
    progress: Progress
    generators_of: dict[str, Any] | None
    """The layout whose generators were saved."""
    manifest: Manifest | None
    """None for a checkpoint of before there were digests."""


def progress_text(progress: Progress, *, generators_of: Layout | None) -> str:
    """The text of `trainer.json`; it names the manifest, whose loss would else be taken for an old checkpoint."""
    layout = None if generators_of is None else asdict(generators_of)
    state = {**asdict(progress), "cursor": dict(progress.cursor), "generators_of": layout, "manifest": MANIFEST}
    return json.dumps(state, indent=2) + "\n"


def open_saved(checkpoint: Path) -> Saved:
    """Reads manifest and progress. Raises: DamagedError; CheckpointError for a folder that is no checkpoint."""
    manifest = read_manifest(checkpoint)
    path = checkpoint / TRAINER
    try:
        raw = path.read_bytes()
    except FileNotFoundError as e:
        if manifest is None and not checkpoint.name.startswith("step_"):
            raise CheckpointError(f"{path} cannot be read ({e}); give the folder of a checkpoint, step_*") from e
        raise DamagedError(f"{TRAINER}: is missing") from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e}); give the folder of a checkpoint, step_*") from e
    if manifest is not None:
        manifest.require(TRAINER, raw)
    try:
        state = json.loads(raw)
        named, generators_of = state.pop("manifest", None), state.pop("generators_of")
        progress = Progress(**state)
        if not isinstance(progress.cursor, dict):
            raise TypeError(f"cursor is {progress.cursor!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DamagedError(f"{TRAINER}: is not valid ({e})") from e
    if named is not None and manifest is None:
        raise DamagedError(f"{named}: is missing")
    return Saved(checkpoint, progress, generators_of, manifest)
