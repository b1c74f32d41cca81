"""Each sequence of a row is asked of its own teacher: what is said of it is that model's in transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rank_server import RankServer

from megabatch.data.tokens.sample import TEACHER_NUMBER, Sample
from megabatch.trainer.pack import collate

COUNT, WHOSE, LENGTHS = 3, (1, 0, 1, 2), (5, 9, 4, 7)


class Asked:
    """A model of transformers in the place of a server; it counts the sequences that it is asked about."""

    def __init__(self, seed: int) -> None:
        import transformers

        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.3,
        )  # fmt: skip
        self.model, self.asked = transformers.Qwen3ForCausalLM(config).eval(), 0

    def likeliest(self, sequences: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        self.asked += len(sequences)
        with torch.no_grad():
            found = [self.model(torch.tensor([ids])).logits[0].log_softmax(1).topk(COUNT) for ids in sequences]
        return [(one.indices.int().numpy(), one.values.numpy()) for one in found]


def said() -> tuple[list[int], float]:
    """How many sequences each teacher was asked about, and how far the columns are from its own numbers at most."""
    from megabatch.trainer.ranks import Ranks
    from megabatch.trainer.sync.scored import ServedTeacher

    draw = np.random.default_rng(3)
    ids = [draw.integers(0, 64, length).astype(np.int32) for length in LENGTHS]
    samples = [
        Sample(one, np.ones(len(one), np.float32), {TEACHER_NUMBER: float(whose)})
        for one, whose in zip(ids, WHOSE, strict=True)
    ]
    packs = [collate(samples[:3], sequence_multiple=4, row_multiple=8), collate(samples[3:])]
    teachers = [Asked(seed) for seed in range(3)]
    with Ranks() as ranks:
        columns = ServedTeacher(teachers, ranks, count=COUNT).columns(packs, None)  # type: ignore[arg-type]
    asked, largest, found = [one.asked for one in teachers], 0.0, iter(zip(ids, WHOSE, strict=True))
    for pack, column in zip(packs, columns, strict=True):
        for start in pack.cu_seqlens_padded.tolist()[: pack.sequences]:
            tokens, whose = next(found)
            ((best, logps),) = teachers[whose].likeliest([tokens.tolist()])
            part = slice(start, start + len(tokens))
            assert column["teacher_ids"][part].tolist() == best.tolist()
            largest = max(largest, float((column["teacher_logits"][part] - torch.from_numpy(logps)).abs().max()))
    return asked, largest


def test_each_sequence_is_asked_of_its_own_teacher(ranks: RankServer) -> None:
    assert ranks.run(said, world_size=1) == [([1, 2, 1], 0.0)]
