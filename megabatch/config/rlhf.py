"""Preference learning and distillation: what all share, then one group for each algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import param


@dataclass(frozen=True, kw_only=True, slots=True)
class Rlhf:
    """Algorithm and reference model of `task="rlhf"`."""

    rlhf_type: Literal["dpo", "grpo", "kto", "rm", "gkd"] = param("dpo", built=False)
    """Algorithm: preferences (dpo, kto), a reward model (rm), rewards (grpo) or distillation (gkd)."""
    ref_load: str | None = param(None, built=False)
    """Folder of the reference model's megatron-core checkpoint; None means `load`."""
    ref_adapter_load: str | None = param(None, built=False)
    """Folder of the reference model's adapter in megatron-core format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dpo:
    """Direct preference optimisation."""

    beta: float = param(0.1, built=False, at_least=0)
    """How strongly the policy is held to the reference; for `ipo` the regularisation."""
    loss_type: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_pair",
        "discopop",
        "apo_zero",
        "apo_down",
        "sft",
    ] = param("sigmoid", built=False)
    """Variant of the loss, in TRL's spelling."""
    rpo_alpha: float | None = param(None, built=False, at_least=0)
    """Weight of the chosen answer's SFT loss added to it; None adds none."""
    reference_free: bool = param(False, built=False)
    """Does without a reference model, as if it found every answer equally likely."""
    label_smoothing: float = param(0.0, built=False, at_least=0, below=0.5)
    """Assumed part of preferences that are the wrong way round."""
    f_divergence_type: Literal["reverse_kl", "js_divergence", "alpha_divergence"] = param("reverse_kl", built=False)
    """Divergence that holds the policy to the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kto:
    """Kahneman-Tversky optimisation, from unpaired good and bad answers."""

    beta: float = param(0.1, built=False, at_least=0)
    """How strongly the policy is held to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = param("kto", built=False)
    """Variant of the loss, in TRL's spelling."""
    desirable_weight: float = param(1.0, built=False, at_least=0)
    """Weight of good answers, against an imbalance."""
    undesirable_weight: float = param(1.0, built=False, at_least=0)
    """Weight of bad answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rm:
    """Reward model training."""

    center_rewards_coefficient: float | None = param(None, built=False, at_least=0)
    """Weight of the term that draws the mean reward to zero (0.01 is usual); None is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gkd:
    """Generalised knowledge distillation."""

    teacher_model: str | None = param(None, built=False)
    """Folder or hub name of the teacher; GKD needs it."""
    teacher_model_type: str | None = param(None, built=False)
    """Teacher's family; None finds it out."""
    teacher_model_revision: str | None = param(None, built=False)
    """Teacher's revision on the hub."""
    beta: float = param(0.5, built=False, at_least=0, at_most=1)
    """Between forward KL (0), the symmetric Jensen-Shannon divergence (0.5) and reverse KL (1)."""
    lmbda: float = param(0.5, built=False, at_least=0, at_most=1)
    """Part of the steps that learn from the student's own answers."""
    seq_kd: bool = param(False, built=False)
    """Learns from answers that the teacher writes."""
    offload_teacher_model: bool = param(False, built=False)
    """Keeps the teacher in host memory between its uses."""
    sft_alpha: float = param(0.0, built=False, at_least=0)
    """Weight of the SFT loss added on answers from the dataset."""
