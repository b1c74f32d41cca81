"""Objectives on transformers' own models in fp64: loss, gradient and metrics of a global batch, from the papers.

Nothing of the trainer is used but the samples of the batch, whose tokens other tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from objective_runs import OBJECTIVES, Kind, class_of
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Text:
    """One sequence of a global batch."""

    ids: Tensor
    learned: Tensor
    """1 or 0: whether each token but the first counts."""
    columns: dict[str, float]
    token_columns: dict[str, Tensor]
    """Of each token but the first, like `learned`."""


@dataclass(frozen=True)
class Found:
    metrics: dict[str, float]
    """With the loss."""
    gradient: dict[str, Tensor]
    """By the names that the exported folder has."""

    @property
    def grad_norm(self) -> float:
        return math.sqrt(sum(float(one.double().square().sum()) for one in self.gradient.values()))


def expected(kind: Kind, folder: Path, texts: Sequence[Text]) -> Found:
    """Args: folder: where `objective_runs.make` wrote."""
    model = _load(folder / kind.base, kind.objective)
    if kind.lora:
        model = peft.PeftModel.from_pretrained(model, kind.start(folder), is_trainable=True).double()
    other: Any = None
    if kind.objective in ("dpo", "kto"):
        other = _load(kind.reference(folder))
    elif kind.objective == "gkd":
        other = [_load(teacher) for teacher in kind.teachers(folder)]
    metrics = _BY_OBJECTIVE[kind.objective](model, other, texts)
    metrics["loss"].backward()
    grads = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    numbers = {name: float(value.detach()) for name, value in metrics.items()}
    return Found(numbers, grads if kind.lora else _with_experts_apart(grads))


def _load(folder: Path, objective: str = "dpo") -> Any:
    """A model that computes in fp64 also where transformers would round to fp32."""
    transformers.utils.logging.disable_progress_bar()
    model = class_of(objective).from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
    return model


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(values: Tensor) -> Tensor:
        return module.weight * values * torch.rsqrt(values.square().mean(-1, keepdim=True) + module.variance_epsilon)

    return forward


def _logits(model: Any, text: Text) -> Tensor:
    """[T - 1, V]: of each token but the first."""
    return model(text.ids[None]).logits[0, :-1]


def _logps(model: Any, texts: Sequence[Text]) -> Tensor:
    """[N]: of the learned tokens of each text."""
    return torch.stack([(_of_tokens(_logits(model, one), one) * one.learned).sum() for one in texts])


def _of_tokens(logits: Tensor, text: Text) -> Tensor:
    return logits.log_softmax(-1).gather(1, text.ids[1:, None])[:, 0]


def _ratios(model: Any, reference: Any, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """(log-probabilities, log-ratios): [N] each."""
    with torch.no_grad():
        theirs = _logps(reference, texts)
    logps = _logps(model, texts)
    return logps, logps - theirs


def _dpo(model: Any, reference: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """sigmoid (arXiv:2305.18290, 7) + ipo (2310.12036, 17, of means over tokens) + aot (2406.05882) + the chosen
    answers' nll."""
    how = OBJECTIVES["dpo"]["dpo"]
    logps, ratios = _ratios(model, reference, texts)
    theirs = (logps - ratios).detach()
    lengths = torch.stack([one.learned.sum() for one in texts])
    delta = ratios[0::2] - ratios[1::2]
    means = ratios / lengths
    ipo = (means[0::2] - means[1::2] - 1 / (2 * how["beta"])).square()
    matched = (logps[0::2] - logps[1::2]).sort().values - (theirs[0::2] - theirs[1::2]).sort().values
    nll = -logps[0::2].sum() / lengths[0::2].sum()
    losses = -logsigmoid(how["beta"] * delta) + ipo - logsigmoid(how["beta"] * matched)
    rewards = how["beta"] * ratios
    return {
        "loss": losses.mean() + how["rpo_alpha"] * nll,
        "nll_loss": nll,
        "rewards/margins": (rewards[0::2] - rewards[1::2]).mean(),
        "rewards/accuracies": (rewards[0::2] > rewards[1::2]).double().mean(),
        **_of_kinds(rewards, logps, torch.arange(len(texts)) % 2 == 0),
    }


def _kto(model: Any, reference: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """arXiv:2402.01306, equations 7 and 8."""
    how = OBJECTIVES["kto"]["kto"]
    own = [one for one in texts if one.columns["matched"]]
    logps, ratios = _ratios(model, reference, own)
    with torch.no_grad():
        others = [one for one in texts if not one.columns["matched"]]
        kl = _ratios(model, reference, others)[1].mean().clamp(min=0)
    good = torch.tensor([one.columns["label"] > 0 for one in own])
    ahead = how["beta"] * (ratios - kl)
    losses = torch.where(good, 1 - ahead.sigmoid(), how["undesirable_weight"] * (1 - (-ahead).sigmoid()))
    rewards = how["beta"] * ratios
    return {
        "loss": losses.mean(),
        "kl": kl,
        "rewards/margins": rewards[good].mean() - rewards[~good].mean(),
        "rewards/accuracies": ((ahead > 0) == good).double().mean(),
        **_of_kinds(rewards, logps, good),
    }


def _of_kinds(rewards: Tensor, logps: Tensor, good: Tensor) -> dict[str, Tensor]:
    return {
        "rewards/chosen": rewards[good].mean(),
        "rewards/rejected": rewards[~good].mean(),
        "logps/chosen": logps[good].mean(),
        "logps/rejected": logps[~good].mean(),
    }


def _rm(model: Any, _: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """arXiv:2307.09288, equation 2, and the centring of arXiv:2312.09244."""
    rewards = torch.stack([model(one.ids[None]).logits[0, 0] for one in texts])
    chosen, rejected = rewards[0::2], rewards[1::2]
    margins = torch.tensor([one.columns["margin"] for one in texts[0::2]], dtype=torch.float64)
    centring = OBJECTIVES["rm"]["rm"]["center_rewards_coefficient"]
    losses = -logsigmoid(chosen - rejected - margins) + centring * (chosen + rejected).square()
    return {
        "loss": losses.mean(),
        "accuracy": (chosen > rejected).double().mean(),
        "margin": (chosen - rejected).mean(),
        "mean_reward": rewards.mean(),
    }


def _prm(model: Any, _: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """arXiv:2211.14275: of each step a choice between wrong and right."""
    ends = [one.learned > 0 for one in texts]
    scores = torch.cat([_logits(model, one)[end] for one, end in zip(texts, ends, strict=True)])
    right = torch.cat([one.token_columns["right"][end] for one, end in zip(texts, ends, strict=True)]).long()
    chances = scores.log_softmax(-1).gather(1, right[:, None])
    return {"loss": -chances.mean(), "accuracy": (scores.argmax(-1) == right).double().mean()}


def _gkd(model: Any, teachers: Sequence[Any], texts: Sequence[Text]) -> dict[str, Tensor]:
    """arXiv:2306.13649, equation 1; each text has its own teacher."""
    how, temperature = OBJECTIVES["gkd"]["gkd"], OBJECTIVES["gkd"]["rollout"]["temperature"]
    beta, tokens = how["beta"], sum(one.learned.sum() for one in texts)
    apart, nll = torch.zeros(()).double(), torch.zeros(()).double()
    for one in texts:
        logits = _logits(model, one)
        with torch.no_grad():
            teacher = teachers[int(one.columns.get("teacher_number", 0))]
            theirs = (_logits(teacher, one) / temperature).log_softmax(-1)
        ours = (logits / temperature).log_softmax(-1)
        mixed = (beta * theirs.exp() + (1 - beta) * ours.exp()).log()
        kl = beta * (theirs.exp() * (theirs - mixed)).sum(-1) + (1 - beta) * (ours.exp() * (ours - mixed)).sum(-1)
        apart = apart + (kl * one.learned).sum() / tokens
        nll = nll - (_of_tokens(logits, one) * one.learned).sum() / tokens
    return {"loss": apart + how["sft_alpha"] * nll, "divergence": apart, "nll_loss": nll}


_BY_OBJECTIVE = {"dpo": _dpo, "kto": _kto, "rm": _rm, "prm": _prm, "gkd": _gkd}


def _with_experts_apart(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers computes with a layer's experts stacked, and saves each of them."""
    found = {}
    for name, one in gradient.items():
        if name.endswith(".experts.gate_up_proj"):
            parts = {"gate_proj": one.chunk(2, dim=1)[0], "up_proj": one.chunk(2, dim=1)[1]}
        elif name.endswith(".experts.down_proj"):
            parts = {"down_proj": one}
        else:
            found[name] = one
            continue
        where = name.rpartition(".")[0]
        found |= {f"{where}.{e}.{leaf}.weight": part[e] for leaf, part in parts.items() for e in range(len(part))}
    return found
