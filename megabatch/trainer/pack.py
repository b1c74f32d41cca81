"""Samples → one flat row of tensors, without padding between the sequences.

T: tokens of the row, padding included, or of one rank's part of it. N: sequences. S: segments, which are the N
sequences plus the row's padding if there is any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.ops.parts import summed
from megabatch.trainer.shared_tokens import Shared
from megabatch.trainer.zigzag import Cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """A micro-batch: concatenated sequences that do not attend to each other."""

    ids_T: Tensor
    """int64 token ids."""
    targets_T: Tensor
    """int64: the next token of the same sequence; 0 at a sequence's last position and in padding."""
    weights_T: Tensor
    """float32: loss weight of predicting `targets_T[t]` at position t; 0 at last positions and in padding."""
    positions_T: Tensor
    """int64: position within the sequence, from 0; the first token's is `shared_N` where a sequence shares tokens."""
    segments_T: Tensor
    """int32: index of the sequence, or N for the row's padding."""
    padding_T: Tensor | None
    """bool: whether a position is padding, of the row or of a sequence; None if there is no padding."""
    cu_seqlens: Tensor
    """int32 [S + 1]: cumulative unpadded lengths in the whole row. The row's padding counts as a sequence, so that
    attention is defined everywhere."""
    cu_seqlens_padded: Tensor
    """int32 [S + 1]: where each segment starts in the whole row. Equal to `cu_seqlens` unless sequences are padded."""
    sequences: int
    """N; 0 for a micro-batch without samples."""
    max_seqlen: int
    """Longest segment, padding included."""
    items_N: Tensor
    """int64: index of the item that each sequence belongs to, from 0; the sequences of an item are adjacent."""
    columns: Mapping[str, Any]
    """One value per sequence: int64 or float32 [N], or a list of other values, such as references to media."""
    token_columns: Mapping[str, Tensor]
    """float32 or int32 [T, …]: values of the prediction made at each position, like `weights_T`; 0 at last positions
    and in padding."""
    row_multiple: int = 1
    """The row's length is a multiple of it; its whole length where that may not change."""
    cut: Cut | None = None
    """How the row is split over context-parallel ranks, when this is one rank's part; None for a whole row."""
    shared_N: Tensor | None = None
    """int64: how many tokens each sequence has before its own, those that the first sequence of its item starts with.
    They stand in the row once, and every other tensor knows a sequence by its own tokens. None where all are 0."""
    read_t: Tensor | None = None
    """int64: the positions that the model's output has (`weighted`); None for all."""

    def weighted(self, cut: Cut | None) -> Tensor:
        """int64 [t]: the positions of a rank's part whose prediction has a weight; the first where none has, since
        collectives want something to send. Of a whole row in host memory, without reading the device."""
        weights_T = self.weights_T if cut is None else self.weights_T[cut.host_t]
        found_t = weights_T.nonzero()[:, 0]
        return found_t if len(found_t) else found_t.new_zeros(1)

    def read(self, values_T: Tensor) -> Tensor:
        """The values of the positions that the model's output has."""
        return values_T if self.read_t is None else values_T[self.read_t]

    def spread(self, values_t: Tensor) -> Tensor:
        """Values of the positions that the model's output has → those of all, 0 at others; differentiable."""
        if self.read_t is None:
            return values_t
        return values_t.new_zeros((len(self.ids_T), *values_t.shape[1:])).index_copy(0, self.read_t, values_t)

    @property
    def shared(self) -> Shared | None:
        """Which tokens of the row the segments share; on the host."""
        if self.shared_N is None:
            return None
        first_N = np.unique(self.items_N.numpy(), return_index=True)[1][self.items_N.numpy()]
        behind: np.ndarray = np.zeros(len(self.cu_seqlens_padded) - 1 - self.sequences, np.int64)
        return Shared(
            np.concatenate([self.cu_seqlens_padded.numpy()[first_N].astype(np.int64), behind]),
            np.concatenate([self.shared_N.numpy(), behind]),
        )

    def part(self, cut: Cut) -> Pack:
        """One rank's part of this row, on the cut's device: its tokens, and every per-sequence value."""
        assert self.cut is None, "a part is not cut again"
        named = {name: value[cut.mine_t] for name, value in self._tensors() if name.endswith("_T")}
        token_columns = {name: values[cut.mine_t] for name, values in self.token_columns.items()}
        return replace(self, **named, token_columns=token_columns, cut=cut)

    def only(self, kept_N: Tensor) -> Pack:
        """The row without the other sequences: as `collate` makes it of the kept ones.

        Args: kept_N: bool, on the device of the row.
        """
        assert self.cut is None, "a part has tokens of every sequence"
        if bool(kept_N.all()):
            return self
        assert self.shared_N is None, "others need the tokens of a sequence that they share"
        inside_T = torch.cat([kept_N, kept_N.new_zeros(1)])[self.segments_T.long()].nonzero()[:, 0]
        kept, lengths = kept_N.nonzero()[:, 0], self.cu_seqlens_padded.diff()[: self.sequences][kept_N].tolist()
        rest = row_length_of(lengths, self.row_multiple, 1) - len(inside_T)
        real = self.cu_seqlens.diff()[: self.sequences][kept_N].tolist()

        def row(values_T: Tensor, *, fill: float = 0) -> Tensor:
            return torch.cat([values_T[inside_T], values_T.new_full((rest, *values_T.shape[1:]), fill)])

        padding_T = self.padding_T if self.padding_T is not None else torch.zeros_like(self.ids_T, dtype=torch.bool)
        padding_T = row(padding_T, fill=1)
        return replace(
            self,
            **_segments(real, lengths, rest=rest),
            ids_T=row(self.ids_T),
            targets_T=row(self.targets_T),
            weights_T=row(self.weights_T),
            positions_T=torch.cat([self.positions_T[inside_T], torch.arange(rest)]),
            padding_T=padding_T if bool(padding_T.any()) else None,
            sequences=len(kept),
            items_N=self.items_N[kept].unique_consecutive(return_inverse=True)[1],
            columns={name: _chosen(values, kept) for name, values in self.columns.items()},
            token_columns={name: row(values) for name, values in self.token_columns.items()},
        )

    def sequence_sums(self, values_T: Tensor) -> Tensor:
        """Sums over each sequence, [T, …] → [N, …]; always over all its tokens, even if this is one part of a row.

        Differentiable. On a part it is collective over the ranks that hold the row, in backward too.
        """
        sums = values_T.new_zeros((self.sequences + 1, *values_T.shape[1:]))
        sums = sums.index_add(0, self.segments_T.long(), values_T)[: self.sequences]
        return sums if self.cut is None else summed(sums, self.cut.group)

    def over_whole_row(self, change: Callable[[Tensor, Tensor], Tensor], values_T: Tensor) -> Tensor:
        """`change(values, segments)` of the whole row, [T] → [T], without gradient; on a part its own tokens of it."""
        values_T = values_T.detach()
        if self.cut is None:
            return change(values_T, self.segments_T)
        row_T = values_T.new_zeros(len(self.cut.places_T))
        row_T[self.cut.mine_t] = values_T
        lengths = self.cu_seqlens_padded.diff()
        segments_T = torch.arange(len(lengths), device=row_T.device).repeat_interleave(lengths.to(row_T.device))
        return change(summed(row_T, self.cut.group), segments_T)[self.cut.mine_t]

    def to(self, device: torch.device | str) -> Pack:
        """The same pack on a device, `cu_seqlens` included."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Pack:
        """The same pack in page-locked memory; needs CUDA."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pack:
        columns = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.columns.items()}
        token_columns = {name: change(values) for name, values in self.token_columns.items()}
        changed = {name: change(value) for name, value in self._tensors()}
        return replace(self, **changed, columns=columns, token_columns=token_columns)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Name and value of each field that is a tensor."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, value) for name, value in values if isinstance(value, Tensor)]


BLANK = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32))
"""The blank of samples that have no columns."""


def collate(
    samples: Sequence[Sample],
    *,
    items: Sequence[int] | None = None,
    shared: Sequence[int] | None = None,
    blank: Sample = BLANK,
    row_multiple: int = 1,
    sequence_multiple: int = 1,
    sequence_length: int = 0,
    row_length: int = 0,
    fixed: bool = False,
) -> Pack:
    """One row of these samples, in order.

    Args: `items`: item index of each sample, None if each sample is an item; `shared`: how many first tokens of each
    sample the row has only in the first of its item, None for none; `blank`: a sample without tokens, which gives the
    columns of a row without samples; `row_multiple`: the row's length is rounded up to a multiple of it with one more
    segment of weight 0 (tensor parallel size for sequence parallelism, 2·cp·tp with context parallelism);
    `row_length`: minimum length of the row, a multiple of `row_multiple`; `sequence_multiple`: each sequence's length
    is rounded up to a multiple of it (2·cp) with tokens of weight 0 at its end; it must divide `row_multiple`;
    `sequence_length`: minimum length of each sequence, a multiple of `sequence_multiple`; `fixed`: whether the row
    must keep its length, because others have the same.
    Without samples the row is padding only.
    """
    assert row_multiple % sequence_multiple == 0, (row_multiple, sequence_multiple)
    shared = list(shared or [0] * len(samples))
    samples = [sample.behind(count) for sample, count in zip(samples, shared, strict=True)]
    real = [len(sample.ids) for sample in samples]
    padded = [_up(max(length, sequence_length), sequence_multiple) for length in real]
    length = max(row_length_of(padded, row_multiple, 1), row_length)
    segments = _segments(real, padded, rest=length - sum(padded))
    tokens, token_columns = _tokens(samples, padded, length, like=samples[0] if samples else blank)
    return Pack(
        **segments,
        **tokens,
        positions_T=_positions(segments["cu_seqlens_padded"], shared),
        sequences=len(samples),
        row_multiple=length if fixed else row_multiple,
        items_N=torch.tensor(range(len(samples)) if items is None else items, dtype=torch.int64),
        columns=_columns(samples) if samples else {name: _stack([value])[:0] for name, value in blank.columns.items()},
        token_columns=token_columns,
        shared_N=torch.tensor(shared, dtype=torch.int64) if any(shared) else None,
    )


def _segments(real: Sequence[int], padded: Sequence[int], *, rest: int) -> dict[str, Any]:
    """The fields of a row that follow from the tokens of its sequences, without and with their padding, and from the
    padding of the row behind them (`rest`), which is a segment too where there is some."""
    behind = [rest] if rest else []
    lengths = torch.tensor([*padded, *behind])
    return {
        "segments_T": torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths),
        "cu_seqlens": _bounds([*real, *behind]),
        "cu_seqlens_padded": _bounds([*padded, *behind]),
        "max_seqlen": max(*padded, rest) if padded else rest,
    }


def _bounds(lengths: Sequence[int]) -> Tensor:
    """Where runs of these lengths start, and where the last one ends: int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _tokens(
    samples: Sequence[Sample], padded: Sequence[int], length: int, *, like: Sample
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a row of this length that its samples' tokens fill, and its token columns.

    Args: padded: tokens of each sample with its padding; like: has the columns of the samples.
    """
    ids_T, targets_T = np.zeros((2, length), np.int64)
    weights_T: np.ndarray = np.zeros(length, np.float32)
    padding_T: np.ndarray = np.ones(length, np.bool_)
    columns = {
        name: np.zeros((length, *values.shape[1:]), values.dtype) for name, values in like.token_columns.items()
    }
    for start, sample in zip(accumulate(padded, initial=0), samples, strict=False):
        stop = start + len(sample.ids)
        ids_T[start:stop] = sample.ids
        padding_T[start:stop] = False
        # Shift within the sequence: its last position has no target, whatever follows it in the row.
        targets_T[start : stop - 1] = sample.ids[1:]
        weights_T[start : stop - 1] = sample.weights[1:]
        for name, values in columns.items():
            values[start : stop - 1] = sample.token_columns[name][1:]
    tokens = {
        "ids_T": torch.from_numpy(ids_T),
        "targets_T": torch.from_numpy(targets_T),
        "weights_T": torch.from_numpy(weights_T),
        "padding_T": torch.from_numpy(padding_T) if padding_T.any() else None,
    }
    return tokens, {name: torch.from_numpy(values) for name, values in columns.items()}


def _positions(starts_S: Tensor, shared: Sequence[int]) -> Tensor:
    """Position of each token in its segment, int64 [T], behind the tokens that the segment shares.

    Args: starts_S: int32 [S + 1], as `Pack.cu_seqlens_padded`.
    """
    first_S = starts_S[:-1].long()
    first_S[: len(shared)] -= torch.tensor(shared, dtype=torch.int64)
    return torch.arange(int(starts_S[-1])) - first_S.repeat_interleave(starts_S.diff())


def row_length_of(lengths: Iterable[int], row_multiple: int, sequence_multiple: int) -> int:
    """Length of a row that holds sequences of these lengths, padding included; at least `row_multiple`."""
    return max(_up(sum(_up(length, sequence_multiple) for length in lengths), row_multiple), row_multiple)


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _chosen(values: Any, kept: Tensor) -> Any:
    """The values of some sequences."""
    return values[kept.to(values.device)] if isinstance(values, Tensor) else [values[index] for index in kept.tolist()]


def _columns(samples: Sequence[Sample]) -> dict[str, Any]:
    """The columns that every sample has, by name."""
    names = set.intersection(*(set(sample.columns) for sample in samples)) if samples else set()
    return {name: _stack([sample.columns[name] for sample in samples]) for name in sorted(names)}


def _stack(values: list[Any]) -> Any:
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    if all(isinstance(value, int | float) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    return values
