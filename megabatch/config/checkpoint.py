"""Checkpoints, and the exchange of weights with Hugging Face's formats and hubs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What to save, when and in which format, and what to start from."""

    save: str | None = param(None, aliases=("output_dir",))
    """Folder for run directories; None means `megatron_output/<last part of the model's name, or the recipe's>`."""
    add_version: bool = param(True)
    """Creates a new folder `v<number>-<time>` in `save` for each run; False uses `save` itself."""
    save_strategy: Literal["steps", "epoch"] = param("steps")
    """Unit of `save_retain_interval` and `save_safetensors_interval`. epoch saves and evaluates at the step that ends
    an epoch, whatever the intervals are; such a step may begin the next one."""
    save_interval: int = param(500, aliases=("save_steps",), at_least=1)
    """Optimizer steps between checkpoints; the last step is always saved. 1 epoch with `save_strategy` epoch."""
    save_retain_interval: int | None = param(None, at_least=1)
    """Deletes older checkpoints unless their step, or epoch, is a multiple of this; None keeps them."""
    save_total_limit: int | None = param(None, at_least=1)
    """Number of newest checkpoints to keep, the best of `metric_for_best_model` among them; None keeps all. The newest
    is kept besides the best."""
    metric_for_best_model: str | None = param(None)
    """Metric of the evaluations (`loss`, or `eval_loss`) whose best checkpoint `checkpoints/best` names; it is never
    deleted. None names none."""
    greater_is_better: bool | None = param(None)
    """Direction of that metric; None means by its name: less is better of names that end in loss, nll, perplexity, kl,
    ece, brier, mse or mae."""
    no_save_optim: bool = param(False)
    """Does not save the optimizer state: a smaller checkpoint, but no exact resume from it."""
    no_save_rng: bool = param(False)
    """Does not save the random number generators."""
    save_safetensors: bool = param(True)
    """Saves Hugging Face safetensors in addition to the state to resume from."""
    save_safetensors_interval: int | None = param(None, at_least=1)
    """Optimizer steps, or epochs, between checkpoints with safetensors, a multiple of `save_interval`; None means
    every checkpoint. The last step's checkpoint always has them; one saved because the run was asked to stop has them
    only if due."""
    max_shard_size: str = param("5GB")
    """Largest safetensors file: a number with B, KB, MB or GB (or KiB, MiB, GiB)."""

    load: str | None = param(None, aliases=("mcore_model",))
    """Checkpoint to start from: a run, one of its `step_*` folders, or with `finetune` any torch_dist folder of
    megatron-core's; None starts from `model`."""
    finetune: bool = param(False)
    """Loads only the weights from `load`: step, optimizer, RNG and position in the data start over."""
    no_load_optim: bool = param(False)
    """Does not load the optimizer state of `load`, which needs less memory."""
    no_load_rng: bool = param(False)
    """Does not load the random number generators of `load`."""
    exit_on_missing_checkpoint: bool = param(True)
    """Fails if `load` holds no checkpoint; False starts from `model` instead."""
    no_initialization: bool = param(True, speed_only=True, negated_aliases=("perform_initialization",))
    """Does not initialise weights that loading will set; a new model is always initialised."""
    ckpt_format: Literal["torch", "torch_dist", "zarr"] = param(
        "torch_dist",
        built=("torch_dist",),
        refused="is a format of sharded state that megatron-core no longer has (0.16)",
    )
    """Format of megatron-core checkpoints."""
    auto_detect_ckpt_format: bool = param(True, speed_only=True)
    """Detects the format of `load`. False has no effect: it is always seen from the files."""
    async_save: bool = param(False)
    """Continues training while a checkpoint is written: training waits for a copy in host memory alone. A run that is
    killed meanwhile resumes from the checkpoint before it."""
    use_persistent_ckpt_worker: bool = param(False, speed_only=True)
    """Keeps one process for asynchronous saves. Has no effect: each rank writes in a thread."""
    ckpt_fully_parallel_load: bool = param(False, speed_only=True)
    """Ranks that need the same part of a checkpoint read and check it once between them, and send it to each other."""
    ckpt_assume_constant_structure: bool = param(False, speed_only=True)
    """Plans a save once and reuses the plan. Has no effect: planning takes a small part of a save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bridge:
    """Exchange with Hugging Face formats and hubs."""

    load_safetensors: bool = param(False, speed_only=True)
    """Has no effect: safetensors are read whenever `load` is not given. Exists so that old scripts are understood."""
    use_hf: bool = param(False)
    """Gets models and datasets from Hugging Face's hub; False gets them from ModelScope."""
    hub_token: str | None = param(None)
    """Name of the environment variable that holds the hub's token, such as HF_TOKEN; never the token itself."""
    adapters: Sequence[str] = param(())
    """Folder of a LoRA adapter to start from, PEFT's or megatron-core's; at most one."""
    ref_model: str | None = param(None)
    """Reference model's safetensors weights, of the policy's shape; None means `model`."""
    ref_adapters: Sequence[str] = param(())
    """Reference model's LoRA adapters; at most one."""
    merge_lora: bool | None = param(None)
    """Merges LoRA into the saved weights; None means yes for safetensors (and `to_hf`) and no for torch_dist."""
    offload_bridge: bool = param(False, speed_only=True)
    """Keeps weights exported for the rollout engine in host memory, where they always are here."""

    def __post_init__(self) -> None:
        freeze_lists(self)
