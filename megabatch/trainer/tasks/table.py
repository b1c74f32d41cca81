"""Which module of the trainer opens which task; `megabatch.tasks` is the table of what recipes may name."""

from __future__ import annotations

from collections.abc import Mapping

from megabatch.config.run import RunConfig
from megabatch.trainer.tasks import (
    dpo,
    embedding,
    generative_reranker,
    gkd,
    grpo,
    kto,
    prm,
    reranker,
    rm,
    seq_cls,
    sft,
)
from megabatch.trainer.tasks.parts import Opener

OPENERS: Mapping[str, Opener] = {
    "pt": sft.parts,
    "sft": sft.parts,
    "dpo": dpo.parts,
    "kto": kto.parts,
    "gkd": gkd.parts,
    "grpo": grpo.parts,
    "rm": rm.parts,
    "prm": prm.parts,
    "seq_cls": seq_cls.parts,
    "embedding": embedding.parts,
    "reranker": reranker.parts,
    "generative_reranker": generative_reranker.parts,
}
"""By `Task.name`, one for each implemented task."""


def opener(run: RunConfig) -> Opener:
    return OPENERS[run.task.name]
