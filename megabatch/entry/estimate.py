"""Memory and time of a recipe, and whether a layout of it may run: the plan's arithmetic applied to recipes."""

from __future__ import annotations

from dataclasses import fields, replace

from megabatch.config.layout import chunks_of, layout_of
from megabatch.config.lengths import generates, item_tokens, row_tokens
from megabatch.config.optimization import Optimizer
from megabatch.config.recipe import Recipe
from megabatch.config.reference import is_second_model
from megabatch.config.resolved import resolved
from megabatch.config.rules.check import check
from megabatch.config.rules.preference import without_reference
from megabatch.config.second_layouts import REFERENCE, TEACHER, Role, parallel_of
from megabatch.config.second_layouts import layout_of as own_layout_of
from megabatch.config.several_teachers import models_named
from megabatch.config.shared_prompts import (
    answers_in_a_row,
    infer_batch_size,
    infers_alone,
    shares_prompts,
    why_local_layers,
)
from megabatch.config.torch_dtype import torch_dtype
from megabatch.entry.other_models import found_beside, has_teacher
from megabatch.entry.trained import trained_of
from megabatch.errors import ConfigError, Fault
from megabatch.plan.communication import groups, leaves_node
from megabatch.plan.estimate import Estimate, estimate
from megabatch.plan.figures import GIB, MemoryEstimate
from megabatch.plan.gpus import GPUS, Gpu, gpu_named
from megabatch.plan.memory import usable_gib
from megabatch.plan.rank_size import rank_sizes
from megabatch.plan.settings import Muon, Settings
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import Chunk
from megabatch.values import dataclass

DEFAULT_GPU = "H100"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_SHAPES: dict[str, ModelShape | None] = {}
"""Of teachers by name: many layouts of a recipe are judged one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a recipe's layout is worth running."""

    keep: bool
    reason: str
    """Why not, in words: the first broken rule, or the memory that it takes; empty for a kept layout."""
    estimate: Estimate | None
    """None if a rule forbids the layout."""


def gpu_of(name: str | None) -> Gpu:
    """The GPU of that name, by default an H100. Raises: ConfigError for an unknown name."""
    gpu = gpu_named(name or DEFAULT_GPU)
    if gpu is None:
        raise ConfigError([Fault("gpu", name, f"is not known; there are {', '.join(GPUS)}")])
    return gpu


def estimate_of(recipe: Recipe, shape: ModelShape, gpu: Gpu) -> Estimate:
    """Time and memory of a step on these GPUs, for a recipe without faults."""
    return estimate(shape, settings_of(recipe, shape), gpu)


def verdict_of(
    recipe: Recipe,
    shape: ModelShape,
    *,
    gpu_memory_gib: float | None = None,
    gpu: Gpu,
    variant_of: Recipe | None = None,
) -> Verdict:
    """Checks the rules, that tp and ep stay inside a node, and the memory.

    Args: gpu_memory_gib: a rank's limit; None is the GPU's memory less the margin (`plan.memory.MARGIN`).

    variant_of: see `config.rules.check.check`.
    """
    faults = check(recipe, shape, variant_of=variant_of)
    if faults:
        return Verdict(keep=False, reason=str(faults[0]), estimate=None)
    settings = settings_of(recipe, shape)
    crossing = [name for name in ("tp", "ep") if _leaves_node(settings, name)]
    found = estimate(shape, settings, gpu)
    if crossing:
        reason = f"{crossing[0]} crosses nodes of {settings.gpus_per_node} GPUs"
    elif found.memory.total_gib > (limit := gpu_memory_gib or usable_gib(gpu)):
        reason = f"{above(found.memory.total_gib, limit)} ({_largest(found.memory)})"
    else:
        reason = ""
    return Verdict(keep=not reason, reason=reason, estimate=found)


def above(gib: float, limit_gib: float) -> str:
    """`80.1 GiB > 71.2 GiB`, with as many digits as tell them apart."""
    digits = next(digits for digits in range(1, 17) if round(gib, digits) > round(limit_gib, digits))
    return f"{gib:.{digits}f} GiB > {round(limit_gib, digits):.12g} GiB"


def _leaves_node(settings: Settings, name: str) -> bool:
    return leaves_node(groups(settings)[name], gpus_per_node=settings.gpus_per_node)


def _largest(memory: MemoryEstimate) -> str:
    """The two largest kinds: `optimizer 62.1, activations 31.0`."""
    kinds = {field.name: getattr(memory, field.name) / GIB for field in fields(memory)}
    largest = sorted(kinds, key=kinds.__getitem__, reverse=True)[:2]
    return ", ".join(f"{kind} {kinds[kind]:.1f}" for kind in largest)


def settings_of(recipe: Recipe, shape: ModelShape) -> Settings:
    """The settings that the plan's estimates need, from a recipe without faults.

    We assume that each row is full and is one sequence, or two of a pair; we do not look at the data.
    """
    parallel, recompute = recipe.parallel, recipe.recompute
    layout, chunks = layout_of(recipe, shape), chunks_of(parallel, shape.num_layers)
    assert layout is not None and chunks is not None, "a recipe without faults has a layout"
    mtp_layers = recipe.mtp.mtp_num_layers or 0
    row = resolved(row_tokens(recipe, shape))
    weight_bytes = _BYTES[torch_dtype(recipe, shape)]
    has_te = why_local_layers(recipe, shape) is None
    return Settings(
        layout=layout,
        chunks=_with_mtp(chunks, mtp_layers),
        mtp_layers=mtp_layers,
        gpus_per_node=recipe.resources.ranks_per_node,
        micro_batch_size=recipe.batch.micro_batch_size,
        infer_batch_size=infer_batch_size(recipe) if generates(recipe) and infers_alone(recipe) else 0,
        row_tokens=resolved(item_tokens(recipe, shape)) - _shared_tokens(recipe, shape, row=row),
        mean_length=row,
        vocab_size=recipe.model.padded_vocab_size or -(-shape.vocab_size // layout.tp) * layout.tp,
        microbatch_group_size=parallel.microbatch_group_size_per_virtual_pipeline_stage or layout.pp,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
        recompute_modules=recompute.recompute_modules,
        attention_scores=has_te and recipe.kernels.attention_backend in ("unfused", "local"),
        # LoRA on Transformer Engine's layers kept 0.85 of what is planned so (docs/gpu.md)
        transformer_engine=has_te and recipe.tuner.tuner_type == "full",
        weight_bytes=weight_bytes,
        gradient_bytes=_BYTES[recipe.optimizer.main_grads_dtype],
        optimizer_bytes=optimizer_bytes(recipe.optimizer, weight_bytes=weight_bytes),
        optimizer_offload_fraction=offload_fraction(recipe.optimizer),
        muon=_muon(recipe.optimizer, weight_bytes=weight_bytes),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        tp_comm_overlap=parallel.tp_comm_overlap,
        moe_permute_fusion=recipe.moe.moe_permute_fusion,
        frozen_copies=_frozen_copies(recipe),
        beside_bytes=_beside_bytes(recipe, shape),
        **trained_of(recipe.tuner, shape),
    )


def _shared_tokens(recipe: Recipe, shape: ModelShape, *, row: int) -> int:
    """Tokens of a GRPO prompt that a row has once for several completions, shared out among these."""
    if not generates(recipe) or not shares_prompts(recipe, shape):
        return 0
    answers, prompt = answers_in_a_row(recipe), max(row - recipe.rollout.max_completion_length, 1)
    return (prompt - 1) * (answers - 1) // answers


def _frozen_copies(recipe: Recipe) -> int:
    """1 where the reference is a model of its own beside the policy, split alike."""
    return int(_has_second_reference(recipe) and not REFERENCE.given(recipe))


def _has_second_reference(recipe: Recipe) -> bool:
    beside = without_reference(recipe) is None and not recipe.rlhf.precompute_ref_log_probs
    return beside and is_second_model(recipe)


def _beside_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """A reference in a layout of its own, and a teacher in the ranks, while the trained model's step is computed."""
    found = 0
    if _has_second_reference(recipe) and REFERENCE.given(recipe):
        found += largest_part(recipe, shape, REFERENCE)
    if has_teacher(recipe):
        found += sum(_teacher_bytes(recipe, name, shape) for name in models_named(recipe.gkd.teacher_model))
    return found


def _teacher_bytes(recipe: Recipe, name: str, student: ModelShape) -> int:
    """0 for a hub's model that is not here yet. In host memory, only the output layer is left, where it is read."""
    if (shape := teacher_shape(recipe, name)) is None:
        return 0
    if not recipe.gkd.offload_teacher_model:
        return largest_part(recipe, shape, TEACHER)
    whole = recipe.kind is not None and recipe.kind.name == "gkd" and recipe.gkd.gkd_logits_topk is None
    rows = -(-shape.vocab_size // recipe.parallel.tensor_model_parallel_size) if whole else 0
    return rows * shape.hidden_size * _BYTES[torch_dtype(recipe, student)]


def teacher_shape(recipe: Recipe, name: str) -> ModelShape | None:
    """None for a hub's model that is not here yet."""
    if name not in _SHAPES:
        _SHAPES[name] = found_beside(recipe, name).shape
    return _SHAPES[name]


def largest_part(recipe: Recipe, shape: ModelShape, role: Role) -> int:
    """Bytes of a second model's weights on the rank that has most of them."""
    parallel = parallel_of(recipe, role, has_experts=shape.num_experts is not None)
    layout, chunks = own_layout_of(recipe, parallel), chunks_of(parallel, shape.num_layers)
    if layout is None or chunks is None:
        return 0  # a fault, which the rules name
    settings = Settings(
        layout=layout,
        chunks=chunks,
        row_tokens=1,
        mean_length=1,
        vocab_size=-(-shape.vocab_size // layout.tp) * layout.tp,
    )
    return max(size.parameters for size in rank_sizes(shape, settings)) * _BYTES[torch_dtype(recipe, shape)]


def offload_fraction(optimizer: Optimizer) -> float:
    return optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0


def optimizer_bytes(optimizer: Optimizer, *, weight_bytes: int) -> int:
    """Bytes of a parameter's main copy and moments, with Muon of those that AdamW updates. fp32 weights are their own
    main copy."""
    moments = 4 if optimizer.sgd_momentum else 0
    if optimizer.optimizer != "sgd":
        moments = _BYTES[optimizer.exp_avg_dtype] + _BYTES[optimizer.exp_avg_sq_dtype]
    return moments if weight_bytes == 4 else moments + 4


_PEAKS = {"medium": 1.0, "high": 0.5, "highest": 1 / 16}
"""Peak of products in bf16, TensorFloat-32 and fp32, in parts of bf16's (NVIDIA's data sheets of A100 and H100)."""


def _muon(optimizer: Optimizer, *, weight_bytes: int) -> Muon | None:
    if optimizer.optimizer != "muon":
        return None
    return Muon(
        state_bytes=4 if weight_bytes == 4 else 8,
        steps=optimizer.muon_num_ns_steps,
        tp_mode=optimizer.muon_tp_mode,
        peak=_PEAKS[optimizer.muon_fp32_matmul_prec],
    )


def _with_mtp(chunks: tuple[Chunk, ...], mtp_layers: int) -> tuple[Chunk, ...]:
    """MTP layers sit on the loss's stage unless a layout string puts them elsewhere."""
    if not mtp_layers or any(chunk.mtp_layers for chunk in chunks):
        return chunks
    return tuple(replace(chunk, mtp_layers=mtp_layers) if chunk.loss else chunk for chunk in chunks)
