"""Batch sizes, and training itself: how long, how reproducible, which task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megabatch.config.declare import param
from megabatch.values import dataclass

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Batch sizes in samples (packed rows with `packing`; completions in GRPO).

    `global_batch_size = micro_batch_size * dp * gradient accumulation steps`, with dp = world / (tp * pp * cp).
    """

    micro_batch_size: int = param(1, at_least=1)
    """Samples that one data parallel rank processes at a time."""
    global_batch_size: int = param(16, at_least=1)
    """Samples per optimizer step, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How long to train, from which seed, and with which loss."""

    train_iters: int | None = param(None, at_least=1)
    """Optimizer steps; set either this or `max_epochs`."""
    max_epochs: int | None = param(None, aliases=("num_train_epochs",), at_least=1)
    """Passes over the training data: `samples * max_epochs // global_batch_size` steps (with `packing`: packs instead
    of samples), counted once the data is prepared. A batch may span two epochs."""
    seed: int = param(42, at_least=0, below=2**32)
    """Seed of initialisation, shuffling, splitting and dropout."""
    deterministic_mode: bool = param(False)
    """Uses only algorithms that give the same bits every time; slower on GPUs."""
    calculate_per_token_loss: bool | None = param(None)
    """Averages the loss over the trained tokens of the global batch, instead of over micro-batches.

    None means False for rlhf and for a `task_type` other than causal_lm, otherwise True.
    """
    task_type: Literal["causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker"] = param("causal_lm")
    """What the model is trained to do."""
    num_labels: int | None = param(None, at_least=1)
    """Labels of a sequence classifier (`task_type` seq_cls)."""
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = param(
        None
    )
    """Kind of sequence classification; None means regression for one label, otherwise single-label."""
    enable_dft_loss: bool = param(False)
    """Dynamic fine-tuning (arXiv:2508.05629): weights each token's loss by its own probability, through which no
    gradient flows. `nll` is then logged beside `loss`."""
    enable_channel_loss: bool = param(False)
    """Logs the loss separately for each value of the data's `channel` column, as `loss_<channel>`; rows without one
    are in the channel `None`."""
    check_model: bool = param(True, speed_only=True)
    """Has no effect: a model's files are always checked against each other and its config.json before the queue and
    before they are loaded, without asking a hub."""
    use_cpu_initialization: bool = param(False, speed_only=True)
    """Has no effect: weights are always read, or drawn, on the CPU, tensor by tensor, and copied to the device."""
    manual_gc: bool = param(False, speed_only=True)
    """Turns Python's garbage collector off during steps, and collects on all ranks at the same steps."""
    manual_gc_interval: int = param(0, aliases=("manual_gc_steps",), speed_only=True, at_least=0)
    """Steps between collections when `manual_gc` is on; 0 collects only at evaluations and saves."""
    megatron_extra_kwargs: Mapping[str, Any] | None = param(None, aliases=("extra_megatron_kwargs",))
    """Further fields of megatron-core's TransformerConfig, by name, that neither a parameter nor the model sets; on
    the command line as a JSON object. A reference has them too, a teacher not."""
