"""Completions of the ledger, as the step that they were written for used them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megabatch.ledger.record import Record, Routes
from megabatch.rl.rounds import Rolled


def rolled(record: Record) -> Rolled:
    """The completion of a record, with its advantage, its mask and all numbers of its tokens."""
    tokens = {"rollout": record.logps, "mask": record.mask, **record.columns}
    return Rolled(
        key=record.key,
        place=str(record.extra.get("place", "")),
        prompt=np.array(record.prompt_ids, np.int32),
        ids=np.array(record.ids, np.int32),
        versions=np.array(record.versions, np.int32),
        finish=record.finish,
        rewards=tuple(float("nan") if value is None else value for value in record.rewards.values()),
        advantage=record.advantage,
        tokens={name: np.array(values, np.float32) for name, values in tokens.items()},
        routes=_array(record.routes),
    )


def routes_of(one: Rolled) -> Routes | None:
    """A completion's routes, for its record."""
    if one.routes is None:
        return None
    form: Literal["|u1", "<i2"] = "|u1" if one.routes.dtype == np.uint8 else "<i2"
    tokens, layers, chosen = one.routes.shape
    return Routes(form=form, shape=(tokens, layers, chosen), data=one.routes.astype(form).tobytes())


def _array(routes: Routes | None) -> np.ndarray | None:
    return None if routes is None else np.frombuffer(routes.data, routes.form).reshape(routes.shape)
