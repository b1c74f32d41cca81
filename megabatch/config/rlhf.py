"""Preference learning and distillation: shared parameters, then one group per algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megabatch.config.declare import MOST_RANKS, freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rlhf:
    """Algorithm and reference model of `task="rlhf"`."""

    rlhf_type: Literal["dpo", "grpo", "kto", "rm", "prm", "gkd"] = param("dpo")
    """Algorithm: preferences (dpo, kto), a reward model (rm) or one of steps (prm), rewards (grpo) or distillation
    (gkd)."""
    ref_load: str | None = param(None, aliases=("mcore_ref_model",))
    """Folder of the reference model's megatron-core checkpoint; None means `load`."""
    ref_adapter_load: str | None = param(None, aliases=("mcore_ref_adapter",))
    """Folder of the reference model's adapter in megatron-core format."""
    share_prompts: bool | None = param(None, aliases=("use_prefix_grouper",))
    """Computes a prompt once for the answers to it that lie in one row: the pair of dpo and rm; the documents of a
    reranker's query; of grpo as many completions as divide both `num_generations` and `micro_batch_size`. With
    `data.packing` a pack then holds more pairs. None means yes wherever it changes no number, which excludes
    Transformer Engine's layers, dropout, balancing losses and capacities of experts, padding, and bnpo."""
    ref_tensor_model_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each matrix of the reference, which may be split otherwise than the trained model;
    None means `tensor_model_parallel_size`. Sequence parallelism goes with it."""
    ref_pipeline_model_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Stages of the reference, with equal numbers of layers; None means `pipeline_model_parallel_size`."""
    ref_context_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each sequence in the reference; None means `context_parallel_size`."""
    ref_expert_model_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks over which a layer's experts are distributed in the reference; None means `expert_model_parallel_size`."""
    ref_expert_tensor_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each expert's matrices in the reference; None means `expert_tensor_parallel_size`."""
    ref_model_server: str | None = param(None)
    """Reference of grpo behind vLLM's OpenAI-compatible servers, in place of one in the ranks: their address, as
    http://host:port, several with commas between them, or `role:NAME` for servers beside the ranks. They serve the
    model that the policy begins with, or another one with its tokenizer."""
    ref_api_key_variable: str | None = param(None)
    """Environment variable that holds these servers' key; never the key itself. Those of a role have the job's own."""
    ref_server_timeout: float = param(240.0, above=0)
    """How long to wait for the reference's servers, at the start and when none answers, in seconds."""
    precompute_ref_log_probs: bool = param(False)
    """Computes the reference's log-probabilities of all data once, before the first step, and keeps them beside the
    token cache; the reference is not in memory while the policy trains. For dpo and kto."""
    precompute_ref_batch_size: int | None = param(None, at_least=1)
    """Packs in a micro-batch of that pass; None means `micro_batch_size`."""
    sync_ref_model: bool = param(False)
    """Blends the policy into the reference model from time to time (TR-DPO); for dpo, kto and grpo."""
    ref_model_sync_steps: int = param(512, at_least=1)
    """Optimizer steps between these blends."""
    ref_model_mixup_alpha: float = param(0.6, above=0, at_most=1)
    """The policy's part in a blend; 1 copies it, as LoRA needs."""


DpoLoss = Literal[
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
    "aot_unpaired",
    "discopop",
    "apo_zero",
    "apo_down",
    "sft",
    "sigmoid_norm",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dpo:
    """Direct preference optimisation."""

    beta: float = param(0.1, at_least=0)
    """How strongly the policy is kept close to the reference; for `ipo` the regularisation."""
    loss_type: DpoLoss | Sequence[DpoLoss] = param("sigmoid")
    """Variant of the loss, in TRL's spelling, or several that are added up; `aot_pair` is TRL's older name of
    `aot_unpaired`."""
    loss_weights: Sequence[float] | None = param(None)
    """Weight of each `loss_type`; None weighs each with 1."""
    rpo_alpha: float | None = param(None, at_least=0)
    """Weight of the chosen answer's SFT loss added to the loss; None adds none."""
    reference_free: bool = param(False)
    """Uses no reference model, as if the reference found every answer equally likely."""
    label_smoothing: float = param(0.0, at_least=0, below=0.5)
    """Assumed fraction of preferences with swapped answers: of `sigmoid`, `exo_pair`, `robust` and `aot`."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = param("reverse_kl")
    """Divergence that keeps the policy close to the reference."""
    f_alpha_divergence_coef: float = param(0.5)
    """Alpha of `alpha_divergence`; 1 is `reverse_kl`."""
    ld_alpha: float | None = param(None, at_least=0, at_most=1)
    """Weight of an answer's tokens beyond the length of the pair's shorter one (LD-DPO); None means 1."""
    use_weighting: bool = param(False)
    """Weighs each pair by how likely the policy finds its answers (WPO): data of other models counts more where the
    policy might have written it."""
    discopop_tau: float = param(0.05, above=0)
    """Temperature with which `discopop` blends its two losses."""

    def __post_init__(self) -> None:
        freeze_lists(self)

    @property
    def loss_types(self) -> tuple[DpoLoss, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kto:
    """Kahneman-Tversky optimisation, from unpaired good and bad answers."""

    beta: float = param(0.1, at_least=0)
    """How strongly the policy is kept close to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = param("kto")
    """Variant of the loss, in TRL's spelling."""
    desirable_weight: float = param(1.0, at_least=0)
    """Weight of good answers, to correct an imbalance."""
    undesirable_weight: float = param(1.0, at_least=0)
    """Weight of bad answers."""
    calculate_KL: bool | None = param(None)
    """Whether the loss measures from the policy's distance to the reference; None means yes for `kto` and no for
    `apo_zero_unpaired`, which has no other value."""

    @property
    def uses_kl(self) -> bool:
        return self.loss_type == "kto" if self.calculate_KL is None else self.calculate_KL


@dataclass(frozen=True, kw_only=True, slots=True)
class Rm:
    """Reward model training."""

    center_rewards_coefficient: float | None = param(None, at_least=0)
    """Weight of the term that pulls the mean reward towards zero (usually 0.01); None disables it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prm:
    """Process reward models: a score for each step of an answer."""

    step_separator: str = param("\n")
    """Text after each step; the step is scored at its last token. May be a special token, such as `<extra_0>`."""
    train_on_last_step_only: bool = param(False)
    """Learns the label of each answer's last step alone. Evaluations measure all steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gkd:
    """Generalised knowledge distillation."""

    teacher_model: str | None = param(None)
    """Folder or hub name of the teacher. GKD needs it, or `teacher_model_server`; GRPO may have either, whose weight
    is `teacher_kl_coef`. Several teachers of GKD, each for the rows with tags of its own, are JSON:
    `[{"model": "Qwen/Qwen2.5-Math-7B", "tags": ["math"]}, …]`."""
    teacher_model_type: str | None = param(None)
    """Teacher's family (`model_type` of its config.json), which must be that; None takes what it is."""
    teacher_model_revision: str | None = param(None)
    """Teacher's revision on the hub: a branch, tag or commit."""
    teacher_tensor_model_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each matrix of the teacher, which may be split otherwise than the trained model;
    None means `tensor_model_parallel_size`. Sequence parallelism goes with it."""
    teacher_pipeline_model_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Stages of the teacher, with equal numbers of layers; None means `pipeline_model_parallel_size`."""
    teacher_context_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each sequence in the teacher; None means `context_parallel_size`."""
    teacher_expert_model_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks over which a layer's experts are distributed in the teacher; None means `expert_model_parallel_size`."""
    teacher_expert_tensor_parallel_size: int | None = param(None, at_least=1, at_most=MOST_RANKS)
    """Ranks that share each expert's matrices in the teacher; None means `expert_tensor_parallel_size`."""
    beta: float = param(0.5, at_least=0, at_most=1)
    """Interpolates between forward KL (0), the symmetric Jensen-Shannon divergence (0.5) and reverse KL (1)."""
    lmbda: float = param(0.5, at_least=0, at_most=1)
    """Fraction of the steps that train on answers of the student itself (on-policy), which the engine of `rollout`
    writes; the others train on the dataset's answers."""
    seq_kd: bool = param(False)
    """In the steps without the student's answers, trains on the teacher's in place of the dataset's."""
    offload_teacher_model: bool = param(False, speed_only=True)
    """Keeps the teacher in page-locked host memory between its passes, on GPUs. The part of its output layer that the
    student's pass reads stays on the device."""
    sft_alpha: float = param(0.0, at_least=0)
    """Weight of an additional SFT loss, in steps whose answers are not the student's."""
    teacher_model_server: str | None = param(None)
    """Teacher behind vLLM's OpenAI-compatible servers, in place of `teacher_model`: their address, as
    http://host:port, several with commas between them, or `role:NAME` for servers beside the ranks. GKD needs
    `gkd_logits_topk`, and servers that give so many (`--max-logprobs`). Several teachers of GKD, each for the rows
    with tags of its own, are JSON: `[{"url": "http://host:port", "tags": ["math"]}, …]`."""
    teacher_tag_key: str = param("dataset")
    """Column that says which of several teachers a row has. Rows without a column `dataset` have their file's
    name in it."""
    teacher_api_key_variable: str | None = param(None)
    """Environment variable that holds the servers' key; never the key itself. A role's servers have the job's own."""
    teacher_server_timeout: float = param(240.0, above=0)
    """How long to wait for the teacher's servers, at the start and when none answers, in seconds."""
    gkd_logits_topk: int | None = param(None, at_least=1)
    """Compares the distributions over the teacher's most likely tokens at each position, this many; None compares them
    over the whole vocabulary."""
