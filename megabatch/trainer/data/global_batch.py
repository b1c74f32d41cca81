"""A global batch → one data-parallel rank's step: its packs, and what is known of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.schedule import PLAIN, Interleaving, cost, deal
from megabatch.data.tokens.sample import Sample
from megabatch.trainer.objectives.objective import Norm
from megabatch.trainer.pack import Pack, collate, row_length_of
from megabatch.trainer.steps import State, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One data-parallel rank's part of every global batch, and the shape of its rows."""

    dp_rank: int = 0
    dp_size: int = 1
    micro_batch_size: int = 1
    interleaving: Interleaving = PLAIN
    """What the pipeline requires of the number of micro-batches in a step."""
    row_multiple: int = 1
    """Rows are padded to a multiple of it, see `pack.collate`."""
    sequence_multiple: int = 1
    equal_rows: int = 1
    """Data-parallel ranks, one behind the other, whose n-th rows of a step are padded to one length: those whose
    dispatcher of experts exchanges whole rows."""
    equal_sequences: bool = False
    """Sequences of a row are padded to one length."""
    row_length: int = 0
    """Least length of every row: the run's longest where all are padded to it."""
    shares_prompts: bool = False
    """Whether a row has the tokens that samples of an item share (`data.tokens.shared`) once."""
    hidden_size: int = 4096
    """Of the model; weighs long sequences against many when balancing."""


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of one optimizer step, on all ranks."""

    data: TokenCache
    samples: Sequence[np.ndarray]
    """Of each pack, those of an item side by side, int64."""
    items: Sequence[np.ndarray]
    """The item of each of them, numbered from 0 in its pack, int64."""

    def step(self, share: Share, *, cursor: State, epoch: float) -> Step:
        """One rank's share of the batch; reads only that rank's samples."""
        costs = [
            cost(self.data.lengths[some], hidden_size=share.hidden_size, shared=self._shared(share, some))
            for some in self.samples
        ]
        dealt = deal(
            np.array(costs),
            dp_size=share.dp_size,
            micro_batch_size=share.micro_batch_size,
            interleaving=share.interleaving,
        )
        everyone = np.concatenate(self.samples)
        first = share.dp_rank - share.dp_rank % share.equal_rows
        rounds = zip(*dealt[first : first + share.equal_rows], strict=True)
        row_lengths = [max(self._row_length(share, places) for places in together) for together in rounds]
        lengths, before = self.data.lengths[everyone], self._shared(share, everyone)
        tokens = int((lengths - before).sum())
        return Step(
            packs=[
                self._pack(share, places, length)
                for places, length in zip(dealt[share.dp_rank], row_lengths, strict=True)
            ],
            totals={
                Norm.TOKENS: float(self.data.sums[everyone].sum()),
                Norm.SEQUENCES: float(len(everyone)),
                Norm.ITEMS: float(sum(int(items[-1]) + 1 for items in self.items)),
            },
            filled=sum(bool(places) for rank in dealt for places in rank),
            tokens=tokens,
            samples=len(everyone),
            mean_length=float((np.square(lengths) - np.square(before)).sum() / tokens),
            cursor=cursor,
            epoch=epoch,
        )

    def _shared(self, share: Share, samples: np.ndarray) -> np.ndarray:
        """How many tokens of these samples a row has only in the first of their item, int64."""
        return self.data.shared(samples) if share.shares_prompts else np.zeros(len(samples), np.int64)

    def _row_length(self, share: Share, places: Sequence[int]) -> int:
        each = [self.data.lengths[some] - self._shared(share, some) for some in (self.samples[p] for p in places)]
        lengths = [int(length) for some in each for length in some]
        if share.equal_sequences:
            lengths = [max(lengths)] * len(lengths) if lengths else []
        return max(row_length_of(lengths, share.row_multiple, share.sequence_multiple), share.row_length)

    def _pack(self, share: Share, places: Sequence[int], row_length: int) -> Pack:
        samples: list[Sample] = []
        items: list[int] = []
        for place in places:
            before = items[-1] + 1 if items else 0
            items += (self.items[place] + before).tolist()
            samples += [self.data[int(index)] for index in self.samples[place]]
        return collate(
            samples,
            items=items,
            shared=[count for place in places for count in self._shared(share, self.samples[place]).tolist()],
            blank=self.data.blank,
            row_multiple=share.row_multiple,
            sequence_multiple=share.sequence_multiple,
            sequence_length=max((len(one.ids) for one in samples), default=0) if share.equal_sequences else 0,
            row_length=row_length,
            fixed=share.equal_rows > 1 or share.row_length > 0,
        )
