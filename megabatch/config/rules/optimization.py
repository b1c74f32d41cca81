"""Rules for learning rate, weight decay, optimizer state and number formats."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.config.torch_dtype import torch_dtype
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def warmup_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    rate = recipe.learning_rate
    if rate.lr_warmup_iters and rate.lr_warmup_fraction is not None:
        rule = f"and lr_warmup_fraction={rate.lr_warmup_fraction} both set the warmup; set one of them to 0 or None"
        yield Fault("learning_rate.lr_warmup_iters", rate.lr_warmup_iters, rule, try_=(0,))
    last = rate.lr_decay_iters or recipe.training.train_iters
    if last is not None and rate.lr_warmup_iters >= last:
        rule = f"must be below the {last} steps of decay"
        yield Fault("learning_rate.lr_warmup_iters", rate.lr_warmup_iters, rule, try_=(last - 1,))


def stable_phase_ends(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """WSD decays at the end, by a length and in a shape of its own; other styles have neither."""
    rate, field = recipe.learning_rate, "learning_rate.lr_wsd_decay_iters"
    length = rate.lr_wsd_decay_iters
    last = rate.lr_decay_iters or recipe.training.train_iters
    if rate.lr_decay_style != "WSD":
        for name, default in (("lr_wsd_decay_iters", None), ("lr_wsd_decay_style", "exponential")):
            if (value := getattr(rate, name)) != default:
                rule = f"needs lr_decay_style='WSD', which is {rate.lr_decay_style!r}"
                yield Fault(f"learning_rate.{name}", value, rule)
    elif length is None:
        yield Fault(field, None, "is missing: lr_decay_style='WSD' needs it", bare=True)
    elif last is not None and length > last - rate.lr_warmup_iters:
        rule = f"must be at most {last - rate.lr_warmup_iters}, the steps of decay after warmup"
        yield Fault(field, length, rule, try_=(max(1, (last - rate.lr_warmup_iters) // 10),))


def norms_to_decay_exist(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.optimizer.apply_wd_to_qk_layernorm and shape is not None and not shape.qk_layernorm:
        rule = f"has no effect: {shape.model_type} has no norms of queries and keys"
        yield Fault("optimizer.apply_wd_to_qk_layernorm", True, rule, try_=(False,))


def weight_decay_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """One that changes has two ends, and `weight_decay` is the one that does not."""
    group = recipe.optimizer
    ends = {name: getattr(group, name) for name in ("start_weight_decay", "end_weight_decay")}
    if group.weight_decay_incr_style == "constant":
        for name, value in ends.items():
            if value is not None:
                rule = "needs weight_decay_incr_style linear or cosine; a constant one is weight_decay"
                yield Fault(f"optimizer.{name}", value, rule)
        return
    for name, value in ends.items():
        if value is None:
            rule = f"is missing: weight_decay_incr_style={group.weight_decay_incr_style!r} needs it"
            yield Fault(f"optimizer.{name}", None, rule, bare=True)
    start, end = ends.values()
    if start is not None and end is not None and end < start:
        rule = f"must be at least start_weight_decay={start}"
        yield Fault("optimizer.end_weight_decay", end, rule, try_=(start,))


def learning_rate_is_above_its_floor(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    rate = recipe.learning_rate
    lr = peak_lr(recipe)
    if rate.min_lr > lr:
        yield Fault("learning_rate.min_lr", rate.min_lr, f"must be at most lr={lr}", try_=(float(f"{lr / 10:g}"), 0))
    if rate.lr_warmup_init > lr:
        yield Fault("learning_rate.lr_warmup_init", rate.lr_warmup_init, f"must be at most lr={lr}", try_=(0,))
    if rate.lr_warmup_init and not (rate.lr_warmup_iters or rate.lr_warmup_fraction):
        rule = "has no effect without lr_warmup_iters or lr_warmup_fraction"
        yield Fault("learning_rate.lr_warmup_init", rate.lr_warmup_init, rule, try_=(0,))


def peak_lr(recipe: Recipe) -> float:
    """lr, or its default for the kind of training."""
    return recipe.learning_rate.lr or (1e-4 if recipe.tuner.tuner_type == "lora" else 1e-5)


def precision_is_said_once(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    fp16, bf16, dtype = recipe.precision.fp16, recipe.precision.bf16, recipe.model.torch_dtype
    if fp16 and bf16:
        yield Fault("precision.fp16", True, "and bf16=True exclude each other; give one of them")
    for name, flag, matching in (("fp16", fp16, "float16"), ("bf16", bf16, "bfloat16")):
        if flag is not None and dtype is not None and flag != (dtype == matching):
            yield Fault(f"precision.{name}", flag, f"contradicts torch_dtype={dtype!r}", try_=(not flag,))
    if recipe.training.deterministic_mode and recipe.kernels.cross_entropy_loss_fusion:
        rule = "is not deterministic; turn it off or unset deterministic_mode"
        yield Fault("kernels.cross_entropy_loss_fusion", True, rule, try_=(False,))


def reduced_state_has_its_optimizer(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    """The precision-aware optimizer is Transformer Engine's Adam, with fp32 copies of bfloat16 weights."""
    group, name = recipe.optimizer, "optimizer.use_precision_aware_optimizer"
    if not group.use_precision_aware_optimizer:
        for field in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if (value := getattr(group, field)) != "fp32":
                yield Fault(f"optimizer.{field}", value, "needs use_precision_aware_optimizer=True", try_=("fp32",))
        return
    if group.optimizer != "adam":
        yield Fault(name, True, f"needs optimizer='adam', which is {group.optimizer!r}", try_=(False,))
    if not recipe.parallel.use_distributed_optimizer:
        yield Fault(name, True, "needs parallel.use_distributed_optimizer=True", try_=(False,))
    if not recipe.resources.gpus_per_node and not group.optimizer_cpu_offload:
        rule = "needs Transformer Engine's Adam, which runs on GPUs, and resources.gpus_per_node is 0"
        yield Fault(name, True, rule, try_=(False,))
    if shape is not None and (dtype := torch_dtype(recipe, shape)) != "bfloat16":
        rule = f"needs the model's torch_dtype to be 'bfloat16', which is {dtype!r}"
        yield Fault(name, True, rule, try_=(False,))


_OF_OFFLOADING = {"optimizer_offload_fraction": 1.0, "overlap_cpu_optimizer_d2h_h2d": False, "pin_cpu_grads": True}
"""Fields with their defaults."""


def offloaded_state_is_adams(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    group, name = recipe.optimizer, "optimizer.optimizer_cpu_offload"
    if not group.optimizer_cpu_offload:
        for field, default in _OF_OFFLOADING.items():
            if (value := getattr(group, field)) != default:
                yield Fault(f"optimizer.{field}", value, "needs optimizer_cpu_offload=True", try_=(default,))
        return
    if group.optimizer != "adam":
        yield Fault(name, True, f"needs optimizer='adam', which is {group.optimizer!r}", try_=(False,))
    if not recipe.parallel.use_distributed_optimizer:
        yield Fault(name, True, "needs parallel.use_distributed_optimizer=True", try_=(False,))
    for field in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if (value := getattr(group, field)) != "fp32":
            rule = "cannot be combined with optimizer_cpu_offload=True: the host's Adam keeps its state in fp32"
            yield Fault(f"optimizer.{field}", value, rule, try_=("fp32",))


def loss_scale_has_a_range(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    first, least = recipe.precision.initial_loss_scale, recipe.precision.min_loss_scale
    if least > first:
        rule = f"must be at most initial_loss_scale={first:g}"
        yield Fault("precision.min_loss_scale", least, rule, try_=(first,))


RULES = (
    warmup_is_said_once,
    stable_phase_ends,
    norms_to_decay_exist,
    learning_rate_is_above_its_floor,
    weight_decay_is_said_once,
    precision_is_said_once,
    reduced_state_has_its_optimizer,
    offloaded_state_is_adams,
    loss_scale_has_a_range,
)
