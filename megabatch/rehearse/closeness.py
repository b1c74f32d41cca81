"""How far two runs of the same steps are from each other: losses, gradient norms, and the gradient of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabatch.converters.safetensors_io import HfFolder
from megabatch.errors import CheckpointError
from megabatch.rehearse.compare import records
from megabatch.run_directory import RunDirectory
from megabatch.values import dataclass

if TYPE_CHECKING:
    import numpy as np

NUMBERS, TENSORS = 1e-5, 1e-4
"""Largest relative differences of losses and norms, and of one tensor's gradient: fp32 sums in another order."""
_SMALL = 1e-3
"""We judge a tensor below this fraction of the gradients' mean size relative to that fraction: the gradient of a key's
bias, for instance, is only rounding."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """One comparison."""

    what: str
    largest: float
    """Relative."""
    at: str
    """Where it is."""
    allowed: float

    @property
    def passes(self) -> bool:
        """NaN never passes."""
        return self.largest <= self.allowed


def closeness(found: RunDirectory, expected: RunDirectory, *, steps: int) -> list[Closeness]:
    """Raises: CheckpointError if the runs did not save the same tensors."""
    train = list(_lines(found, expected, "train", ("loss", "grad_norm")))
    made = [_worst(f"{name} of {steps} steps", train, name, NUMBERS) for name in ("loss", "grad_norm")]
    evaluated = list(_lines(found, expected, "eval", ("eval_loss",)))
    made += [_worst("evaluations", evaluated, "eval_loss", NUMBERS)] if evaluated else []
    tensors = list(_tensors(found, expected, steps))
    return [*made, _worst(f"gradients of {len(tensors)} tensors", tensors, "gradient", TENSORS)]


_Found = tuple[str, str, float]
"""(name, place, relative difference)"""


def _worst(what: str, all_found: list[_Found], name: str, allowed: float) -> Closeness:
    found = [(difference, place) for one, place, difference in all_found if one == name]
    largest, place = max(found, key=lambda one: one[0] if one[0] == one[0] else float("inf"))
    return Closeness(what, largest, place, allowed)


def _lines(found: RunDirectory, expected: RunDirectory, kind: str, names: tuple[str, ...]) -> Iterator[_Found]:
    theirs = records(found, kind)
    for step, line in sorted(records(expected, kind).items()):
        for name in names:
            yield name, f"step {step}", _relative(theirs.get(step, {}), line, name)


def _relative(found: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> float:
    if name not in found:
        return float("nan")
    return abs(found[name] - expected[name]) / max(abs(expected[name]), 1e-12)


def _tensors(found: RunDirectory, expected: RunDirectory, step: int) -> Iterator[_Found]:
    """The relative error of the last step's change of each tensor, in L2 norms."""
    import numpy as np

    ours, theirs = _changes(found, step), _changes(expected, step)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise CheckpointError(f"{found.step(step)} and {expected.step(step)} differ in tensors: {', '.join(odd[:3])}")
    norms = {name: float(np.linalg.norm(change)) for name, change in theirs.items()}
    floor = _SMALL * float(np.sqrt(np.mean([norm**2 for norm in norms.values()])))
    for name, change in theirs.items():
        yield "gradient", name, float(np.linalg.norm(ours[name] - change)) / max(norms[name], floor, 1e-30)


def _changes(run: RunDirectory, step: int) -> dict[str, np.ndarray]:
    after, before = (_read(run.step(number) / "hf") for number in (step, step - 1))
    return {name: after[name] - before[name] for name in after}


def _read(folder: Path) -> dict[str, np.ndarray]:
    import numpy as np

    opened = HfFolder(folder)
    return {name: np.frombuffer(opened.read(name).data, np.float32).astype(np.float64) for name in opened.names}
