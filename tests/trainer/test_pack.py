from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.pack import Pack, collate
from megabatch.trainer.readouts.scores import ends
from megabatch.trainer.shared_tokens import keys_of


def sample(ids: list[int], weights: list[float], **columns: object) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32), columns)


FIRST = sample([10, 11, 12], [0, 1, 0.5], number=7, name="a")
SECOND = sample([20, 21], [0, 1], number=8, name="b")


def lists(pack: Pack) -> dict[str, list[float]]:
    return {
        name: getattr(pack, name).tolist()
        for name in ("ids_T", "targets_T", "weights_T", "positions_T", "segments_T", "cu_seqlens", "cu_seqlens_padded")
    }


def test_two_sequences_and_a_padding_segment_by_hand() -> None:
    pack = collate([FIRST, SECOND], row_multiple=4)
    assert lists(pack) == {
        "ids_T": [10, 11, 12, 20, 21, 0, 0, 0],
        "targets_T": [11, 12, 0, 21, 0, 0, 0, 0],
        "weights_T": [1, 0.5, 0, 1, 0, 0, 0, 0],
        "positions_T": [0, 1, 2, 0, 1, 0, 1, 2],
        "segments_T": [0, 0, 0, 1, 1, 2, 2, 2],
        "cu_seqlens": [0, 3, 5, 8],
        "cu_seqlens_padded": [0, 3, 5, 8],
    }
    assert (pack.sequences, pack.max_seqlen) == (2, 3)
    assert pack.columns["number"].tolist() == [7, 8]
    assert pack.columns["name"] == ["a", "b"]


def test_padding_is_marked() -> None:
    assert collate([FIRST, SECOND]).padding_T is None
    for settings, expected in (
        ({"row_multiple": 4}, [0, 0, 0, 0, 0, 1, 1, 1]),
        ({"row_length": 6}, [0, 0, 0, 0, 0, 1]),
        ({"row_multiple": 8, "sequence_multiple": 4}, [0, 0, 0, 1, 0, 0, 1, 1]),
    ):
        padding_T = collate([FIRST, SECOND], **settings).padding_T
        assert padding_T is not None
        assert padding_T.int().tolist() == expected


def test_sequences_padded_for_context_parallelism_by_hand() -> None:
    pack = collate([FIRST, SECOND], row_multiple=8, sequence_multiple=4)
    assert lists(pack) == {
        "ids_T": [10, 11, 12, 0, 20, 21, 0, 0],
        "targets_T": [11, 12, 0, 0, 21, 0, 0, 0],
        "weights_T": [1, 0.5, 0, 0, 1, 0, 0, 0],
        "positions_T": [0, 1, 2, 3, 0, 1, 2, 3],
        "segments_T": [0, 0, 0, 0, 1, 1, 1, 1],
        "cu_seqlens": [0, 3, 5],
        "cu_seqlens_padded": [0, 4, 8],
    }


def test_no_label_crosses_from_one_sequence_into_the_next() -> None:
    """Rolling the ids of the whole row instead would make 12 predict 20 and 21 predict 10."""
    wrong = sample([20, 21], [1, 1])  # even a weight on a first token predicts nothing
    pack = collate([wrong, FIRST, wrong])
    ends = (pack.cu_seqlens[1:] - 1).long()
    assert pack.weights_T[ends].tolist() == [0, 0, 0]
    assert pack.targets_T[ends].tolist() == [0, 0, 0]
    rolled = torch.roll(pack.ids_T, -1)
    assert (rolled[ends] != pack.targets_T[ends]).all(), "the case would not show the fault"


def test_weights_and_shift_equal_each_sample_alone() -> None:
    rng = np.random.default_rng(0)
    samples = [
        sample(rng.integers(1, 99, n).tolist(), [0.0, *rng.random(n - 1).tolist()]) for n in rng.integers(1, 9, 20)
    ]
    pack = collate(samples, row_multiple=16, sequence_multiple=2)
    starts = pack.cu_seqlens_padded.tolist()
    for start, one in zip(starts, samples, strict=False):
        n = len(one.ids)
        assert pack.ids_T[start : start + n].tolist() == one.ids.tolist()
        assert pack.targets_T[start : start + n - 1].tolist() == one.ids[1:].tolist()
        assert pack.weights_T[start : start + n - 1].tolist() == one.weights[1:].tolist()
    assert pack.weights_T.double().sum().item() == pytest.approx(sum(s.weights.sum(dtype=float) for s in samples))
    assert len(pack.ids_T) % 16 == 0


def test_a_row_that_fits_gets_no_padding_segment() -> None:
    assert collate([FIRST, sample([1], [0])], row_multiple=4).cu_seqlens.tolist() == [0, 3, 4]


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_empty_micro_batch_is_one_row_of_padding(multiple: int) -> None:
    pack = collate([], row_multiple=multiple)
    assert pack.weights_T.tolist() == [0] * multiple
    assert pack.cu_seqlens.tolist() == [0, multiple]
    assert (pack.sequences, pack.columns) == (0, {})


def test_dtypes_and_moving() -> None:
    pack = collate([FIRST], row_multiple=4).to("meta")
    dtypes = {name: getattr(pack, name).dtype for name in ("ids_T", "weights_T", "segments_T", "cu_seqlens")}
    assert list(dtypes.values()) == [torch.int64, torch.float32, torch.int32, torch.int32]
    assert pack.columns["number"].device.type == pack.targets_T.device.type == "meta"


def test_columns_of_tokens_are_shifted_like_weights() -> None:
    """Position t holds the value of the token that is predicted there."""
    columns = {"logps": np.array([0, -1, -2], np.float32), "top": np.array([[0, 0], [1, 2], [3, 4]], np.int32)}
    first = Sample(FIRST.ids, FIRST.weights, {"label": 1.0}, columns)
    pack = collate([first, first], items=[0, 0], row_multiple=4, sequence_multiple=4)
    assert pack.token_columns["logps"].tolist() == [-1, -2, 0, 0] * 2
    assert pack.token_columns["top"].tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]] * 2
    assert pack.token_columns["top"].dtype == torch.int32
    assert pack.columns["label"].tolist() == [1, 1]
    assert pack.items_N.tolist() == [0, 0]
    assert collate([FIRST, SECOND]).items_N.tolist() == [0, 1]
    moved = pack.to("meta")
    assert moved.token_columns["top"].device.type == moved.items_N.device.type == "meta"


def test_an_empty_micro_batch_has_the_columns_of_the_others() -> None:
    blank = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), {"label": 0.0, "name": ""}, {
        "top": np.zeros((0, 2), np.int32)})  # fmt: skip
    pack = collate([], blank=blank, row_multiple=4)
    assert (pack.columns["label"].shape, pack.columns["name"]) == ((0,), [])
    assert pack.token_columns["top"].tolist() == [[0, 0]] * 4
    assert len(pack.items_N) == 0


THIRD = sample([30, 31, 32, 33], [0, 0, 1, 1], number=9, name="c")


@pytest.mark.parametrize("settings", [{}, {"row_multiple": 4}, {"row_multiple": 8, "sequence_multiple": 4}])
@pytest.mark.parametrize(
    "kept", [[True, False, True], [False, True, False], [True, True, True], [False, False, False]]
)
def test_a_row_of_some_of_its_sequences(kept: list[bool], settings: dict[str, int]) -> None:
    samples = [replace(one, token_columns={"t": one.weights * 3}) for one in (FIRST, SECOND, THIRD)]
    chosen = [one for one, keeps in zip(samples, kept, strict=True) if keeps]
    found = collate(samples, items=[0, 1, 1], **settings).only(torch.tensor(kept))
    blank = replace(FIRST, ids=FIRST.ids[:0], weights=FIRST.weights[:0], token_columns={"t": FIRST.weights[:0]})
    items = {2: [0, 1], 1: [0], 3: [0, 1, 1], 0: []}[len(chosen)]
    expected = collate(chosen, items=items, blank=blank, **settings)
    if chosen or settings:  # a row of nothing at all has the length 1, or that of its multiple
        assert lists(found) == lists(expected)
    assert found.items_N.tolist() == expected.items_N.tolist()
    assert (found.sequences, found.max_seqlen) == (expected.sequences, expected.max_seqlen)
    assert (found.padding_T is None) == (expected.padding_T is None)
    if found.padding_T is not None:
        assert found.padding_T.tolist() == expected.padding_T.tolist()
    assert found.columns["number"].tolist() == expected.columns["number"].tolist()
    assert found.token_columns["t"].tolist() == expected.token_columns["t"].tolist()


def test_a_row_that_must_keep_its_length() -> None:
    found = collate([FIRST, SECOND], row_length=8, fixed=True).only(torch.tensor([False, True]))
    assert lists(found)["ids_T"] == [20, 21, 0, 0, 0, 0, 0, 0]
    assert found.cu_seqlens.tolist() == [0, 2, 8]


def test_sequences_that_share_tokens_by_hand() -> None:
    answers = (
        sample([5, 6, 7, 8, 9], [0, 0, 0, 1, 0.5]),
        sample([5, 6, 7, 3], [0, 0, 0, 1]),
        sample([5, 6, 7], [0] * 3),
    )
    samples = [replace(one, token_columns={"t": 3 * one.weights}) for one in (SECOND, *answers)]
    pack = collate(samples, items=[0, 1, 1, 1], shared=[0, 0, 2, 2], row_multiple=12)
    assert lists(pack) == {
        "ids_T": [20, 21, 5, 6, 7, 8, 9, 7, 3, 7, 0, 0],
        "targets_T": [21, 0, 6, 7, 8, 9, 0, 3, 0, 0, 0, 0],
        "weights_T": [1, 0, 0, 0, 1, 0.5, 0, 1, 0, 0, 0, 0],
        "positions_T": [0, 1, 0, 1, 2, 3, 4, 2, 3, 2, 0, 1],
        "segments_T": [0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 4, 4],
        "cu_seqlens": [0, 2, 7, 9, 10, 12],
        "cu_seqlens_padded": [0, 2, 7, 9, 10, 12],
    }
    assert pack.token_columns["t"].tolist() == [3 * weight for weight in pack.weights_T.tolist()]
    shared = pack.shared
    assert shared is not None and (shared.starts_S.tolist(), shared.counts_S.tolist()) == (
        [0, 2, 2, 2, 0],
        [0, 0, 2, 2, 0],
    )
    assert ends(pack).nonzero()[:, 0].tolist() == [1, 6, 8, 9]
    counts, keys = keys_of(np.array([0, 2, 7, 9, 10]), np.array([2, 5, 2, 1, 2]), shared)
    assert counts.tolist() == [2, 5, 4, 3, 2]
    assert keys.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 7, 8, 2, 3, 9, 10, 11]
    with pytest.raises(AssertionError, match="learned"):
        collate(samples, items=[0, 1, 1, 1], shared=[0, 0, 3, 0])


def test_the_output_of_some_positions_is_spread_over_the_row() -> None:
    made = collate([FIRST, SECOND], row_multiple=4)
    pack = replace(made, read_t=made.weighted(None))
    assert pack.read_t is not None
    assert pack.read_t.tolist() == pack.weights_T.nonzero()[:, 0].tolist()
    values_t = torch.arange(1.0, len(pack.read_t) + 1, requires_grad=True)
    spread_T = pack.spread(values_t)
    assert pack.read(spread_T).tolist() == values_t.tolist()
    assert int((spread_T != 0).sum()) == len(values_t) < len(pack.ids_T)
    (spread_T * torch.arange(len(pack.ids_T))).sum().backward()
    assert values_t.grad is not None and values_t.grad.tolist() == pack.read_t.tolist()
    assert collate([], row_multiple=4).weighted(None).tolist() == [0], "a row without weights keeps one position"
