"""A task that uses all of the trainer's contracts: pairs, a frozen reference, prepared columns, steps of its own.

It is DPO (arXiv:2305.18290, equation 7) over pairs of neighbouring samples, the first of which is the chosen one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.trainer.assemble import virtual_size
from megabatch.trainer.data.dataset import open_data
from megabatch.trainer.engine import Engine
from megabatch.trainer.exports.hugging_face import hugging_face_export
from megabatch.trainer.model.build import build
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives.objective import Inference, Mean, Norm, Objective, Terms
from megabatch.trainer.pack import Pack
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.readout import Readout
from megabatch.trainer.readouts.tokens import Tokens
from megabatch.trainer.steps import State, Step, Steps
from megabatch.trainer.sums import Ratio
from megabatch.trainer.tasks.parts import Parts

BETA = 0.5


def in_pairs(cache: TokenCache) -> TokenCache:
    """Neighbours belong together; an odd last sample joins the pair before it."""
    bounds = torch.arange(0, len(cache) + 1, 2).numpy()
    bounds[-1] = len(cache)
    return replace(cache, items=bounds)


class Preference(Objective):
    """The mean over pairs of -log sigmoid(beta · (margin of the policy - margin of the reference))."""

    norm = Norm.ITEMS
    metrics: tuple[str, ...] = ("loss", "margin", "reference")
    readout: Readout = Tokens()

    def prepare(self, packs: Sequence[Pack], inference: Inference) -> Sequence[Pack]:
        found = inference.infer(packs, self.readout, model="reference")
        # a number of the global batch, as KTO's KL is: here the mean log-probability of a token
        sums = torch.zeros(2, device=found[0]["logps"].device)
        for pack, one in zip(packs, found, strict=True):
            weights_T = pack.weights_T.to(sums.device)
            sums += torch.stack([(one["logps"] * weights_T).sum(), weights_T.sum()])
        total = inference.total(sums)
        mean = total[0] / total[1]
        return [
            replace(pack, token_columns={**pack.token_columns, "reference": one["logps"]},
                    columns={**pack.columns, "mean": mean.expand(pack.sequences)})
            for pack, one in zip(packs, found, strict=True)
        ]  # fmt: skip

    def terms(self, out: Mapping[str, Tensor], pack: Pack) -> Terms:
        gained_T = (out["logps"] - pack.token_columns["reference"]) * pack.weights_T
        gained_N = pack.sequence_sums(gained_T)
        first_N = torch.ones_like(pack.items_N, dtype=torch.bool)
        first_N[1:] = pack.items_N[1:] != pack.items_N[:-1]
        signs_N = torch.where(first_N, 1.0, -1.0)
        margins = gained_N.new_zeros(int(first_N.sum())).index_add(0, pack.items_N, gained_N * signs_N)
        loss = -torch.nn.functional.logsigmoid(BETA * margins).sum()
        pairs = gained_N.new_tensor(float(len(margins)))
        reference = pack.columns["mean"].sum() if pack.sequences else pairs * 0
        count = gained_N.new_tensor(float(pack.sequences))
        return Terms(
            per="sequence",
            numerator=loss,
            weight=pairs,
            metrics={
                "loss": Mean(loss.detach(), pairs),
                "margin": Mean(margins.detach().sum(), pairs),
                "reference": Mean(reference, count),
            },
        )


@dataclass(frozen=True)
class Noting(Steps):
    """Steps whose cursor nobody but them can read, and which say something of themselves."""

    inner: Any
    train_iters: int
    course: str = "pairs"

    def require(self, cursor: State) -> None:
        self.inner.require(cursor.get("inner", {}))

    def after(self, cursor: State, engine: Engine) -> Iterator[Step]:
        taken = cursor.get("taken", 0)
        for number, step in enumerate(self.inner.after(cursor.get("inner", {}), engine), taken + 1):
            state = {"inner": step.cursor, "taken": number}
            yield replace(step, cursor=state, metrics={"rounds": Ratio(float(number), 1.0)})


def parts(run: RunConfig, source: ModelSource, ranks: Ranks, *, busy: Callable[[], None]) -> Parts:
    opened = TokenCache.open
    TokenCache.open = classmethod(lambda cls, path, **how: in_pairs(opened(path, **how)))  # type: ignore[assignment, method-assign]
    objective = Preference()
    dataset, validation = open_data(run, source, ranks, objective, busy=busy)
    TokenCache.open = opened  # type: ignore[method-assign]
    config = transformer_config(run.recipe, run.shape, virtual_size=virtual_size(run))
    reference = build(run.shape, config, ranks, None, vocab_size=run.recipe.model.padded_vocab_size)
    source.load(reference, ranks)
    return Parts(
        steps=Noting(dataset, dataset.train_iters),
        objective=objective,
        evaluator=validation,
        export=hugging_face_export(run, source),
        frozen={"reference": reference},
    )
