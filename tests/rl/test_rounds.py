"""A round comes back from its file as it was, and a damaged file is named."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megabatch.errors import DataError
from megabatch.rl.rounds import Rolled, Round


def rolled(number: int, length: int) -> Rolled:
    values = np.linspace(-1, 0, length, dtype=np.float32)
    return Rolled(
        key=f"3/0/{number}",
        place="train.jsonl:9",
        prompt=np.arange(number + 1, dtype=np.int32),
        ids=np.arange(length, dtype=np.int32),
        versions=np.full(length, 7, np.int32),
        finish=("stop", "length")[number % 2],
        rewards=(float("nan"), number / 3),
        advantage=number - 0.1,
        tokens={"rollout": values, "old": values * 2},
    )


def test_a_round_is_read_back_as_it_was(tmp_path: Path) -> None:
    made = Round(
        number=3,
        completions=[rolled(0, 2), rolled(1, 0), rolled(2, 5)],
        after={"epoch": 1, "offset": 8, "data": "ab"},
        epoch=1.25,
        metrics={"generate_s": (0.1, 1.0)},
    )
    made.save(tmp_path / "rounds" / "round_00000003.npz")
    found = Round.load(tmp_path / "rounds" / "round_00000003.npz")
    assert [found.number, found.after, found.epoch, found.metrics] == [3, made.after, 1.25, made.metrics]
    for one, other in zip(found.completions, made.completions, strict=True):
        assert (one.key, one.place, one.finish, one.advantage) == (
            other.key,
            other.place,
            other.finish,
            other.advantage,
        )
        assert math.isnan(one.rewards[0]) and one.rewards[1] == other.rewards[1]
        for name in ("prompt", "ids", "versions"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert {name: values.tolist() for name, values in one.tokens.items()} == {
            name: values.tolist() for name, values in other.tokens.items()
        }
    assert [one.is_cut_off for one in found.completions] == [False, True, False]
    assert [file.name for file in (tmp_path / "rounds").iterdir()] == ["round_00000003.npz"]


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "round_00000003.npz"
    with pytest.raises(DataError, match=r"round_00000003.npz: the run stopped between the steps of a round"):
        Round.load(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="cannot be read"):
        Round.load(path)
