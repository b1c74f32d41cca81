"""Steps of a stream on one rank: packs of whole items, and where their samples come from."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megabatch.data.rows.sources import resolve
from megabatch.data.stream import Place, Stream
from megabatch.data.tokens.encoding import Encoding
from megabatch.trainer.data.batches import Ahead
from megabatch.trainer.data.global_batch import Share
from megabatch.trainer.data.stream import Streamed, prepared
from megabatch.trainer.objectives.objective import Norm


class OneRank:
    """The ranks of a world of one process."""

    is_main = True

    def on_main(self, function: Any) -> Any:
        return function()


@pytest.mark.parametrize("packing_length", [None, 64])
def test_places_are_those_of_the_rows_over_all_files(
    packing_length: int | None, tokenizer_folder: Path, tmp_path: Path
) -> None:
    paths = []
    for name, rows in (("b", 150), ("a", 40)):
        paths.append(tmp_path / f"{name}.jsonl")
        lines = [f'{{"query": "{name} {row}?", "response": "{"apple " * (row % 9 + 1)}"}}' for row in range(rows)]
        paths[-1].write_text("\n".join(lines))
    stream = Stream(sources=resolve(list(map(str, paths))), encoding=Encoding(tokenizer=tokenizer_folder),
                    vocab_size=400, global_batch_size=8, seed=3, shuffle=True, shuffle_epochs=True, block_rows=128,
                    packing_length=packing_length)  # fmt: skip
    ranks: Any = OneRank()
    steps = Streamed(stream=stream, fingerprint="x", ranks=ranks, share=Share(micro_batch_size=4),
                     ahead=Ahead(workers=0), train_iters=9)  # fmt: skip
    drawn = list(islice(stream.batches(Place(data="x")), 22))
    for step, batch in zip(islice(steps.after({}, ranks), 22), drawn, strict=True):
        found = sorted(place for pack in step.packs for place in steps.places(pack))
        assert found == sorted(str(batch.samples.origin(index)) for index in range(len(batch.samples)))
        assert step.totals[Norm.TOKENS] == sum(float(pack.weights_T.sum()) for pack in step.packs)
        assert step.totals[Norm.ITEMS] == step.samples == len(batch.samples)
        assert step.cursor == batch.place.to_json()
    assert {Path(file).name for file, _ in steps.files} == {"a.jsonl", "b.jsonl"}


def test_batches_prepared_by_a_thread_come_in_order_with_their_error() -> None:
    def numbers() -> Any:
        yield from range(5)
        raise ValueError("the sixth")

    made = prepared(numbers(), 2)
    assert list(islice(made, 5)) == list(range(5))
    with pytest.raises(ValueError, match="the sixth"):
        next(made)
