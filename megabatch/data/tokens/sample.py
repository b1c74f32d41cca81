"""One training example: as it is tokenised, and as it is read from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from megabatch.values import dataclass

_NONE: Mapping[str, Any] = MappingProxyType({})


CHANNEL = "channel"
"""The name column by which `training.enable_channel_loss` splits the loss."""


TEACHER_NUMBER = "teacher_number"
"""The column that says which of several teachers a sample has."""


class Encoded(NamedTuple):
    """One tokenised sample."""

    ids: np.ndarray
    """int32 [n]"""
    weights: np.ndarray
    """float32 [n]"""
    columns: Mapping[str, float] = _NONE
    """Values of the sample, such as a label or a margin; all samples of a dataset have the same columns."""
    token_columns: Mapping[str, np.ndarray] = _NONE
    """Further values per token: float32 or int32 [n, …], aligned with `ids` and `weights`."""
    names: Mapping[str, str] = _NONE
    """Names that many samples share, such as the channel; all samples of a dataset have the same columns."""

    def part(self, which: slice) -> Encoded:
        """A slice of its tokens; nothing predicts the first of them, so its weight is 0."""
        weights = self.weights[which].copy()
        weights[:1] = 0
        cut = {name: values[which] for name, values in self.token_columns.items()}
        return self._replace(ids=self.ids[which], weights=weights, token_columns=cut)


Item = list[Encoded]
"""The samples of one row that belong together: one, or a pair, or an anchor with its candidates."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example."""

    ids: np.ndarray
    """Token ids, int32 [n]."""
    weights: np.ndarray
    """Loss weight of predicting each token, float32 [n]; the first is 0."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values of the sample, for objectives and for error messages."""
    token_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 or int32 [n, …]: values of the prediction of each token, like `weights`."""

    def behind(self, count: int) -> Sample:
        """The sample without its first `count` tokens, none of which is learned; nor is the next, which then stands
        first."""
        if not count:
            return self
        assert not self.weights[: count + 1].any(), "the tokens before are learned"
        values = {name: values[count:] for name, values in self.token_columns.items()}
        return replace(self, ids=self.ids[count:], weights=self.weights[count:], token_columns=values)
