"""GRPO, and the engines that generate its completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megabatch.config.declare import freeze_lists, param


@dataclass(frozen=True, kw_only=True, slots=True)
class Grpo:
    """Group relative policy optimisation. Batch sizes count completions."""

    beta: float = param(0.04, built=False, at_least=0)
    """Weight of the KL term; 0 needs no reference model."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] = param("grpo", built=False)
    """How the loss is averaged, or which surrogate it uses."""
    num_generations: int = param(8, built=False, at_least=2)
    """Completions per prompt (G)."""
    num_generations_eval: int | None = param(None, built=False, at_least=1)
    """Completions per prompt in an evaluation; None means `num_generations`."""
    steps_per_generation: int = param(1, built=False, at_least=1)
    """Optimizer steps per round of generation."""
    generation_batch_size: int | None = param(None, built=False, at_least=1)
    """Completions per round of generation; None means `global_batch_size * steps_per_generation`."""
    num_iterations: int = param(1, built=False, at_least=1)
    """How often each completion is used for an update (mu)."""
    reward_funcs: Sequence[str] = param((), built=False)
    """Rewards: accuracy, format, cosine, repetition, soft_overlong, or your own as `file.py:function`."""
    reward_weights: Sequence[float] | None = param(None, built=False)
    """Weight of each reward, reward models last; None weighs them equally."""
    scale_rewards: Literal["group", "batch", "none", "gdpo"] | None = param(None, built=False)
    """Standard deviation that advantages are divided by; gdpo normalises each reward first. None means group."""
    epsilon: float = param(0.2, built=False, at_least=0)
    """Clipping: the ratio stays above 1 - epsilon, and below 1 + `epsilon_high`."""
    epsilon_high: float | None = param(None, built=False, at_least=0)
    """Upper clipping range; None means `epsilon`."""
    delta: float | None = param(None, built=False, above=0)
    """Upper bound of the ratio for negative advantages, above 1 + epsilon; None sets none."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = param("token", built=False)
    """Ratio for each token, for each sequence (GSPO), or the sequence's with the token's gradient."""
    dynamic_sample: bool = param(False, built=False)
    """Generates again for prompts whose completions all have the same reward."""
    max_resample_times: int = param(3, built=False, at_least=1)
    """Number of tries of `dynamic_sample`."""
    overlong_filter: bool = param(False, built=False)
    """Excludes truncated completions from the loss."""
    off_policy_sequence_mask_delta: float | None = param(None, built=False)
    """Excludes sequences with a negative advantage whose mean log-ratio old - current exceeds this."""
    rollout_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = param(None, built=False)
    """Correction for the difference between the trainer's and the engine's probabilities; None applies no
    correction."""
    rollout_importance_sampling_threshold: float = param(2.0, built=False, above=0)
    """Ratio above which that correction truncates or masks."""
    log_rollout_offpolicy_metrics: bool = param(False, built=False)
    """Logs that difference even without a correction."""
    log_completions: bool = param(False, built=False)
    """Logs prompts, completions and rewards."""

    def __post_init__(self) -> None:
        freeze_lists(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Generation: sampling, the engine, and the memory that the trainer frees for it."""

    temperature: float = param(0.9, built=False, above=0)
    """Temperature of sampling and of the probabilities in the loss."""
    max_completion_length: int = param(512, built=False, at_least=1)
    """Longest completion in tokens."""
    async_generate: bool = param(False, built=False)
    """Generates the next round with the previous policy while training on the last one."""
    vllm_mode: Literal["server", "colocate"] | None = param(None, built=False)
    """vLLM in its own server process, or inside the trainer's."""
    vllm_server_host: str | None = param(None, built=False)
    """Server's host."""
    vllm_server_port: int = param(8000, built=False, at_least=1, at_most=65535)
    """Server's port."""
    vllm_server_base_url: str | None = param(None, built=False)
    """Server's address, instead of host and port."""
    vllm_server_timeout: float = param(240.0, built=False, above=0)
    """How long to wait for the server, in seconds."""
    vllm_server_pass_dataset: bool = param(False, built=False)
    """Sends a sample's other columns to the server, for multi-turn schedulers."""
    vllm_tensor_parallel_size: int = param(1, built=False, at_least=1)
    """GPUs that share the engine's matrices."""
    vllm_gpu_memory_utilization: float = param(0.9, built=False, above=0, at_most=1)
    """Fraction of a GPU's memory that the engine may use."""
    vllm_max_model_len: int | None = param(None, built=False, at_least=1)
    """Longest prompt plus completion in tokens; None means the model's limit."""
    vllm_enforce_eager: bool = param(False, built=False)
    """Runs the engine without CUDA graphs."""
    vllm_limit_mm_per_prompt: Mapping[str, int] | None = param(None, built=False)
    """Number of images and other media that a prompt may have, by kind; on the command line as a JSON object."""
    vllm_enable_prefix_caching: bool = param(True, built=False)
    """Reuses the computation of common prompt beginnings."""
    vllm_enable_lora: bool = param(False, built=False)
    """Sends adapters to the engine instead of merged weights."""
    sleep_level: Literal[0, 1, 2] = param(0, built=False)
    """What the engine frees during training: nothing, its cache, or its weights too."""
    offload_optimizer: bool = param(False, built=False)
    """Moves optimizer state to host memory during generation."""
    offload_model: bool = param(False, built=False)
    """Moves the trained model to host memory during generation."""
