"""Losses of preference pairs, one value per pair; each is checked against TRL.

P: pairs of a micro-batch. A log-ratio is log p_policy(answer) - log p_reference(answer), summed over the answer's
tokens. The names are TRL's (`DPOConfig.loss_type`, 1.16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_MOST_EXPONENT = 80.0
"""exp of more than about 88 is infinite in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Numbers that the losses depend on."""

    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What is known of each pair; all fp32 [P]."""

    chosen_P: Tensor
    """Log-ratio of the chosen answer."""
    rejected_P: Tensor
    chosen_scores_P: Tensor
    """f'(ratio) of the chosen answer (`scores`); its log-ratio for the reverse KL divergence."""
    rejected_scores_P: Tensor
    chosen_tokens_P: Tensor
    """Number of the answer's tokens: the sum of their loss weights."""
    rejected_tokens_P: Tensor

    @property
    def delta(self) -> Tensor:
        return self.chosen_scores_P - self.rejected_scores_P

    @property
    def mean_delta(self) -> Tensor:
        """The same with each score divided by its answer's tokens."""
        chosen_P = self.chosen_scores_P / self.chosen_tokens_P.clamp(min=1.0)
        return chosen_P - self.rejected_scores_P / self.rejected_tokens_P.clamp(min=1.0)


Loss = Callable[[Pairs, Settings], Tensor]


def scores(log_ratios: Tensor, divergence: str, *, alpha: float = 0.5) -> Tensor:
    """f'(u) of the ratio u = p_policy / p_reference, up to a constant, elementwise (arXiv:2309.16240).

    reverse_kl: log u; forward_kl: 1 - 1 / u; js_divergence: log(2 u / (u + 1)); alpha_divergence:
    (u^(alpha - 1) - 1) / (alpha - 1), whose limit at alpha = 1 is log u.
    """
    if divergence == "forward_kl":
        return 1 - torch.exp(-log_ratios)
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * log_ratios).clamp(max=_MOST_EXPONENT)) / (alpha - 1)
    return log_ratios


def sigmoid(pairs: Pairs, how: Settings) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), d: difference of scores, e: `label_smoothing`.

    arXiv:2305.18290, equation 7; with smoothing conservative DPO (Mitchell, 2023), which TRL 1.16 no longer has.
    """
    return _smoothed(how.beta * pairs.delta, how.label_smoothing)


def hinge(pairs: Pairs, how: Settings) -> Tensor:
    """max(0, 1 - beta d). arXiv:2309.06657."""
    return torch.relu(1 - how.beta * pairs.delta)


def ipo(pairs: Pairs, how: Settings) -> Tensor:
    """(d - 1 / (2 beta))^2 with log-ratios averaged over an answer's tokens. arXiv:2310.12036, equation 17."""
    return (pairs.mean_delta - 1 / (2 * how.beta)).square()


def exo_pair(pairs: Pairs, how: Settings) -> Tensor:
    """KL of softmax(beta scores) from (1 - e, e). arXiv:2402.00856, equation 16."""
    logits_P, e = how.beta * pairs.delta, how.label_smoothing
    won_P = torch.sigmoid(logits_P) * (logsigmoid(logits_P) - math.log1p(-e))
    return won_P + torch.sigmoid(-logits_P) * (logsigmoid(-logits_P) - math.log(e))


def nca_pair(pairs: Pairs, how: Settings) -> Tensor:
    """-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2, rewards c and r. arXiv:2402.05369."""
    chosen_P, rejected_P = how.beta * pairs.chosen_P, how.beta * pairs.rejected_P
    return -logsigmoid(chosen_P) - 0.5 * (logsigmoid(-chosen_P) + logsigmoid(-rejected_P))


def robust(pairs: Pairs, how: Settings) -> Tensor:
    """((1 - e) l(d) - e l(-d)) / (1 - 2 e), l(d) = -log sigmoid(beta d). arXiv:2403.00409."""
    logits_P, e = how.beta * pairs.delta, how.label_smoothing
    return (e * logsigmoid(-logits_P) - (1 - e) * logsigmoid(logits_P)) / (1 - 2 * e)


def bco_pair(pairs: Pairs, how: Settings) -> Tensor:
    """-log sigmoid(c) - log sigmoid(-r), rewards c and r, without a moving mean. arXiv:2404.04656."""
    return -logsigmoid(how.beta * pairs.chosen_P) - logsigmoid(-how.beta * pairs.rejected_P)


def sppo_hard(pairs: Pairs, how: Settings) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, log-ratios c and r. arXiv:2405.00675, equation 4.7 with P in
    {0, 1}."""
    half = 0.5 / how.beta
    return (pairs.chosen_P - half).square() + (pairs.rejected_P + half).square()


def discopop(pairs: Pairs, how: Settings) -> Tensor:
    """(1 - m) (-log sigmoid(x)) + m exp(-x), x = beta d, m = sigmoid(x / tau). arXiv:2406.08414, equation 5."""
    logits_P = how.beta * pairs.delta
    mixed_P = torch.sigmoid(logits_P / how.discopop_tau)
    return -logsigmoid(logits_P) * (1 - mixed_P) + torch.exp(-logits_P) * mixed_P


def apo_zero(pairs: Pairs, how: Settings) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta r). arXiv:2408.06266, equation 7."""
    return 1 - torch.sigmoid(how.beta * pairs.chosen_P) + torch.sigmoid(how.beta * pairs.rejected_P)


def apo_down(pairs: Pairs, how: Settings) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta (c - r)). arXiv:2408.06266, equation 8."""
    apart_P = torch.sigmoid(how.beta * (pairs.chosen_P - pairs.rejected_P))
    return torch.sigmoid(how.beta * pairs.chosen_P) + 1 - apart_P


def sigmoid_norm(pairs: Pairs, how: Settings) -> Tensor:
    """-log sigmoid(beta d) with scores averaged over an answer's tokens. arXiv:2411.15124 (Tülu 3)."""
    return -logsigmoid(how.beta * pairs.mean_delta)


def matched(ahead_P: Tensor, behind_P: Tensor, how: Settings) -> Tensor:
    """The loss of two values that equal ranks of two samples bring together, for `aot` and `aot_unpaired`.

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), d = ahead - behind. arXiv:2406.05882.
    """
    return _smoothed(how.beta * (ahead_P - behind_P), how.label_smoothing)


def _smoothed(logits_P: Tensor, e: float) -> Tensor:
    loss_P = -logsigmoid(logits_P)
    return loss_P if e == 0 else (1 - e) * loss_P - e * logsigmoid(-logits_P)


LOSSES: Mapping[str, Loss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "discopop": discopop,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": sigmoid_norm,
}
"""Losses of each pair alone. `Dpo` computes `aot`, `aot_unpaired` and `sft`, which depend on the global batch."""
