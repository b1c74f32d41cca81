"""A round: completions that were generated together, and all that the optimizer steps on them need.

A run that stops between the steps of a round reads it back from a file: the policy that made it is gone by then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megabatch.errors import DataError
from megabatch.values import dataclass

Sum = tuple[float, float]
"""A metric's numerator and count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rolled:
    """One completion. Arrays of tokens are as long as `ids`."""

    key: str
    """round/prompt/number."""
    place: str
    """Where the prompt was read, such as `train.jsonl:17`."""
    prompt: np.ndarray
    """int32 token ids."""
    ids: np.ndarray
    """int32 token ids."""
    versions: np.ndarray
    """int32: the policy's version that made each token."""
    finish: str
    """`stop`, `length` or `aborted`."""
    rewards: tuple[float, ...]
    """One for each of the run's rewards; NaN where it has none."""
    advantage: float = 0.0
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 by name: log-probabilities (`rollout`, `old`, `reference`), `correction`, and `mask`, which is 0 where
    an environment and not the model wrote a token."""
    routes: np.ndarray | None = None
    """[tokens of prompt and completion, layers, K]: the experts that each token went to, where they are replayed."""

    @property
    def mask(self) -> np.ndarray:
        """float32: 1 for the model's tokens."""
        found = self.tokens.get("mask")
        return np.ones(len(self.ids), np.float32) if found is None else found

    @property
    def is_cut_off(self) -> bool:
        """Whether it ended before the model wanted it to."""
        return self.finish != "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """The completions of one round, those of a prompt side by side."""

    number: int
    """From 0."""
    completions: Sequence[Rolled]
    after: Mapping[str, Any]
    """Where the next round's prompts begin, as JSON."""
    epoch: float
    """Passes over the prompts, this round included."""
    metrics: Mapping[str, Sum]
    """What was measured of the round as a whole."""

    def save(self, path: Path) -> None:
        """Writes it, atomically. Raises: DataError for a disk that cannot hold it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                arrays: Any = self._arrays()
                np.savez_compressed(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as e:
            raise DataError(f"{path}: the round cannot be written ({e.strerror or e}); free space there") from e

    def _arrays(self) -> dict[str, np.ndarray]:
        some = self.completions
        said = {
            "number": self.number,
            "after": dict(self.after),
            "epoch": self.epoch,
            "metrics": {name: list(sums) for name, sums in self.metrics.items()},
            "texts": [[one.key, one.place, one.finish] for one in some],
            "columns": list(some[0].tokens),
        }
        return {
            "said": np.frombuffer(json.dumps(said).encode(), np.uint8),
            "prompt_lengths": np.array([len(one.prompt) for one in some], np.int32),
            "lengths": np.array([len(one.ids) for one in some], np.int32),
            "prompts": np.concatenate([one.prompt for one in some]),
            "ids": np.concatenate([one.ids for one in some]),
            "versions": np.concatenate([one.versions for one in some]),
            "rewards": np.array([one.rewards for one in some], np.float64),
            "advantages": np.array([one.advantage for one in some], np.float64),
            **({} if some[0].routes is None else {"routes": np.concatenate([one.routes for one in some])}),
            **{f"column_{name}": np.concatenate([one.tokens[name] for one in some]) for name in some[0].tokens},
        }

    @classmethod
    def load(cls, path: Path) -> Round:
        """Raises: DataError for a file that is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            return _of_arrays(arrays)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as e:
            raise DataError(
                f"{path}: the run stopped between the steps of a round, and its completions cannot be read ({e}); "
                "resume from a checkpoint at the end of a round, or start over with checkpoint.finetune=True"
            ) from e


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> Round:
    said = json.loads(arrays["said"].tobytes())
    ends = np.cumsum(arrays["lengths"])[:-1]
    split = {name: np.split(arrays[name], ends) for name in ("ids", "versions")}
    columns = {name: np.split(arrays[f"column_{name}"], ends) for name in said["columns"]}
    prompts = np.split(arrays["prompts"], np.cumsum(arrays["prompt_lengths"])[:-1])
    whole = np.cumsum(arrays["prompt_lengths"] + arrays["lengths"])[:-1]
    routes = np.split(arrays["routes"], whole) if "routes" in arrays else [None] * len(said["texts"])
    completions = [
        Rolled(
            key=key,
            place=place,
            prompt=prompts[number],
            ids=split["ids"][number],
            versions=split["versions"][number],
            finish=finish,
            rewards=tuple(arrays["rewards"][number].tolist()),
            advantage=float(arrays["advantages"][number]),
            tokens={name: parts[number] for name, parts in columns.items()},
            routes=routes[number],
        )
        for number, (key, place, finish) in enumerate(said["texts"])
    ]
    metrics = {name: (float(total), float(count)) for name, (total, count) in said["metrics"].items()}
    return Round(
        number=said["number"], completions=completions, after=said["after"], epoch=said["epoch"], metrics=metrics
    )
