"""Sums and means over the completions of a flat row, for formulas that need not know how rows are split over ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Sequences:
    """The N sequences of a row of T tokens, or of one rank's part of it."""

    segments_T: Tensor
    """int: index of each token's sequence; N in the row's padding."""
    count: int
    """N."""
    sums: Callable[[Tensor], Tensor]
    """[T, …] → [N, …]: sums over whole sequences, wherever their tokens are; differentiable."""

    @classmethod
    def on_one_rank(cls, segments_T: Tensor, count: int) -> Sequences:
        """For rows that one rank has as a whole."""

        def sums(values_T: Tensor) -> Tensor:
            found = values_T.new_zeros((count + 1, *values_T.shape[1:]))
            return found.index_add(0, segments_T.long(), values_T)[:count]

        return cls(segments_T, count, sums)

    def means(self, values_T: Tensor, mask_T: Tensor) -> Tensor:
        """[N]: the mean over the tokens that `mask_T` (0 or 1) keeps; 0 for a sequence without any."""
        return self.sums(values_T * mask_T) / self.sums(mask_T).clamp(min=1)

    def spread(self, values_N: Tensor) -> Tensor:
        """[T]: each token has its sequence's value, padding has 0."""
        padded = values_N.new_zeros(self.count + 1)
        padded[: self.count] = values_N
        return padded[self.segments_T.long()]
