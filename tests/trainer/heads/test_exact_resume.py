"""Runs with a head that were stopped go on bit for bit: steps of answers, lists of documents, embeddings."""

from __future__ import annotations

from pathlib import Path

import test_embedding
import test_prm
import test_reranker
from headed import merged
from rank_server import RankServer
from runs import curve, train, write_run

from megabatch import Recipe

SAVED = {"checkpoint": {"no_save_optim": False}}


def trained_whole_and_in_two(whole: list[str], cut: list[str]) -> list[int]:
    return [train(run) for run in whole] + [train(run, stop_after=2) for run in cut] + [train(run) for run in cut]


def recipes(folder: Path) -> dict[str, Recipe]:
    test_embedding.write_rows(folder / "train.jsonl", count=24, seed=0, least=1)
    test_embedding.write_rows(folder / "validation.jsonl", count=5, seed=1, least=1)
    (folder / "steps").mkdir()
    return {
        "prm": test_prm.made(folder / "steps", **SAVED),
        "listwise reranker": test_reranker.made(folder, 1, **SAVED),
        # each step computes the vectors of all rows first, and then their gradients, two rows at a time
        "embedding": test_embedding.made(folder, 1, merged(SAVED, {"batch": {"micro_batch_size": 2}})),
    }


def test_a_run_that_was_stopped_goes_on_bit_for_bit(ranks: RankServer, tmp_path: Path) -> None:
    made = recipes(tmp_path)
    whole, cut = ({name: write_run(one, tmp_path / f"{name}, {kind}") for name, one in made.items()}
                  for kind in ("whole", "cut"))  # fmt: skip
    (codes,) = ranks.run(
        trained_whole_and_in_two, world_size=1, whole=list(map(str, whole.values())), cut=list(map(str, cut.values()))
    )
    assert codes == [0] * 3 + [75] * 3 + [0] * 3
    for name, run in cut.items():
        assert curve(run) == curve(whole[name]), name
        assert len(curve(run)) > 2
