"""Shrinks a recipe to a few CPU processes and keeps what exact resuming depends on.

Kept: the model's family and kind of layers, number formats, the parallel layout as far as the machine's cores go,
accumulation, packing, shuffling, objective, optimizer, what checkpoints hold. What is not is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megabatch.config.declare import parameters
from megabatch.config.layout import layout_of, virtual_stages
from megabatch.config.model import Model
from megabatch.config.new_model import declared_shape
from megabatch.config.recipe import Recipe
from megabatch.config.resolved import resolved
from megabatch.config.rules.check import check
from megabatch.config.second_layouts import REFERENCE, TEACHER
from megabatch.errors import ConfigError, Fault
from megabatch.plan.shape import ModelShape
from megabatch.values import dataclass

LENGTH, ROWS, VALIDATION_ROWS, VOCABULARY, SAVE_EVERY = 256, 200, 24, 512, 3
HEAD_DIM, MLP, EXPERT_MLP = 8, 64, 32
LOSS_SCALE = 2.0**12
"""Initial loss scale of fp16: a few steps are not enough to come down from 2**32."""


@dataclass(frozen=True, slots=True)
class Small:
    """The small recipe, and what it leaves out."""

    recipe: Recipe
    left_out: tuple[str, ...]
    """`group.name=value: why`, for parameters with which the recipe's own run would differ in more than size."""


def shrink(recipe: Recipe, shape: ModelShape, *, steps: int, max_ranks: int) -> Small:
    """The same recipe with a new model, little data and `steps` steps on at most `max_ranks` CPU processes.

    Raises: ConfigError if the small recipe has faults that no default fixes.
    """
    notes: list[str] = []
    parallel, world = _fewer_ranks(recipe, shape, max_ranks=max_ranks, notes=notes)
    small = replace(recipe, **{group: replace(getattr(recipe, group), **fields) for group, fields in parallel.items()})
    small = _on_cpus(small, notes)
    vp = virtual_stages(recipe.parallel, shape.num_layers)
    small = _small_model(small, shape, notes, vp=vp)
    small = _little_data(small, notes)
    small = _new_adapters(small, notes)
    small = _few_steps(small, recipe, shape, steps=steps, world=world, vp=vp)
    return _without_faults(small, notes)


def _fewer_ranks(
    recipe: Recipe, shape: ModelShape, *, max_ranks: int, notes: list[str]
) -> tuple[Mapping[str, Mapping[str, Any]], int]:
    """The layout's sizes, halved from the largest until the ranks fit; two replicas if the recipe has more."""
    p = recipe.parallel
    names = {
        "tensor_model_parallel_size": p.tensor_model_parallel_size,
        "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
        "context_parallel_size": p.context_parallel_size,
        "expert_model_parallel_size": p.expert_model_parallel_size,
        "expert_tensor_parallel_size": p.expert_tensor_parallel_size,
    }
    sizes = dict(names)
    while _least_ranks(*sizes.values()) > max_ranks:
        largest = max(sizes, key=lambda name: sizes[name])
        sizes[largest] = max(size for size in range(1, sizes[largest]) if sizes[largest] % size == 0)
    world = _least_ranks(*sizes.values())
    layout = layout_of(recipe, shape)
    tp, pp = sizes["tensor_model_parallel_size"], sizes["pipeline_model_parallel_size"]
    replica = tp * pp * sizes["context_parallel_size"]
    if layout is not None and layout.dp > 1 and world == replica and 2 * world <= max_ranks:
        world *= 2
    for name, size in sizes.items():
        if size != names[name]:
            notes.append(f"parallel.{name}={names[name]}: {size} here")
    uneven = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
    )
    notes += [f"parallel.{name}={getattr(p, name)!r}: even stages here" for name in uneven if getattr(p, name)]
    vp = virtual_stages(p, shape.num_layers)
    changed: dict[str, Any] = (
        dict(sizes)
        | dict.fromkeys(uneven)
        | {
            "account_for_embedding_in_pipeline_split": False,
            "account_for_loss_in_pipeline_split": False,
            "num_layers_per_virtual_pipeline_stage": None,
            "num_virtual_stages_per_pipeline_rank": vp if vp > 1 and pp > 1 else None,
            "sequence_parallel": p.sequence_parallel and tp > 1,
            "distributed_backend": "gloo",
        }
    )
    ranks = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": world, "cpus_per_task": 1, "omp_num_threads": 1}
    return {"parallel": changed, "resources": ranks, **_lain_alike(recipe, notes)}, world


def _lain_alike(recipe: Recipe, notes: list[str]) -> dict[str, dict[str, None]]:
    """A teacher and a reference in the trained model's layout, whose ranks are fewer here."""
    found: dict[str, dict[str, None]] = {}
    for role in (TEACHER, REFERENCE):
        for size, value in role.given(recipe).items():
            found.setdefault(role.group, {})[role.prefix + size] = None
            notes.append(f"{role.field(size)}={value}: as the trained model here")
    return found


def _least_ranks(tp: int, pp: int, cp: int, ep: int, etp: int) -> int:
    return pp * math.lcm(tp * cp, ep * etp)


def _on_cpus(recipe: Recipe, notes: list[str]) -> Recipe:
    """Drops settings that only change speed on GPUs."""
    for parameter in parameters(Recipe):
        group = getattr(recipe, parameter.group)
        value = getattr(group, parameter.name)
        if parameter.facts.speed_only and value != parameter.default and parameter.group in ("kernels", "moe"):
            notes.append(f"{parameter.dotted}={value!r}: only changes speed on GPUs")
            recipe = replace(recipe, **{parameter.group: replace(group, **{parameter.name: parameter.default})})
    return recipe


def _small_model(recipe: Recipe, shape: ModelShape, notes: list[str], *, vp: int) -> Recipe:
    parallel = recipe.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    groups = max(2, tp)
    heads = groups * (2 if shape.num_query_groups < shape.num_attention_heads else 1)
    layers = max(2, parallel.pipeline_model_parallel_size * vp)
    if recipe.model.new_special_tokens:
        notes.append("model.new_special_tokens: left out, since the small model is a new one")
    model = Model(
        model_type=shape.model_type,
        tokenizer=recipe.model.tokenizer if Path(recipe.model.tokenizer or "/nowhere").is_dir() else None,
        torch_dtype=recipe.model.torch_dtype or _dtype(shape),
        num_layers=layers,
        hidden_size=heads * HEAD_DIM,
        ffn_hidden_size=MLP,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=HEAD_DIM,
        padded_vocab_size=VOCABULARY,
        max_position_embeddings=2 * LENGTH,
        norm_epsilon=shape.norm_epsilon,
        rotary_base=shape.rotary_base,
        untie_embeddings_and_output_weights=shape.untie_embeddings_and_output_weights,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
    )
    moe = recipe.moe
    if shape.num_experts is not None:
        experts = max(4, 2 * ep)
        mixed = not all(shape.moe_layers)
        moe = replace(
            moe,
            num_experts=experts,
            moe_ffn_hidden_size=EXPERT_MLP,
            moe_router_topk=min(shape.moe_router_topk or 1, 2),
            moe_router_pre_softmax=shape.moe_router_pre_softmax,
            moe_layer_freq=[0, *[1] * (layers - 1)] if mixed else None,
        )
    return replace(recipe, model=model, moe=moe)


def _dtype(shape: ModelShape) -> Any:
    declared = str(shape.hf_config.get("torch_dtype") or shape.hf_config.get("dtype") or "bfloat16")
    return declared.removeprefix("torch.")


def _little_data(recipe: Recipe, notes: list[str]) -> Recipe:
    data = recipe.data
    train = [here for text in data.dataset if (here := _few_rows(text, ROWS))]
    validation = [here for text in data.val_dataset if (here := _few_rows(text, VALIDATION_ROWS))]
    changed: dict[str, Any] = {}
    if len(train) < len(data.dataset) or len(validation) < len(data.val_dataset):
        notes.append(f"data.dataset={list(data.dataset)!r}: not on this machine; made-up sums instead")
        example = f"example:{resolved(recipe.kind).example}"
        train = [f"{example}#{ROWS}"]
        validation = [f"{example}#{VALIDATION_ROWS}"] if data.val_dataset else []
        changed |= {"columns": None, "preprocess": None, "interleave_prob": None}
        changed["stopping_strategy"] = "first_exhausted"
    length = min(data.max_length or LENGTH, LENGTH)
    length -= length % (2 * recipe.parallel.context_parallel_size * recipe.parallel.tensor_model_parallel_size)
    if data.truncation_strategy in (None, "delete", "raise"):
        # with so few rows, all of them must count; a question that is answered with yes or no keeps its end
        changed["truncation_strategy"] = "left" if resolved(recipe.kind).rows == "yes_no" else "right"
    return replace(
        recipe,
        data=replace(
            data,
            dataset=train,
            val_dataset=validation,
            max_length=length,
            seq_length=None,
            packing_length=min(data.packing_length or length, length) if data.packing else None,
            num_workers=min(data.num_workers, 1),
            dataset_num_proc=1,
            **changed,
        ),
    )


def _new_adapters(recipe: Recipe, notes: list[str]) -> Recipe:
    """Adapters fit only the model that they were trained with, so we make new ones, and compare with them merged."""
    bridge, tuner = recipe.bridge, recipe.tuner
    if bridge.adapters or tuner.adapter_load is not None:
        notes.append("bridge.adapters and tuner.adapter_load: new adapters instead")
    if bridge.merge_lora is False and tuner.tuner_type == "lora":
        notes.append("bridge.merge_lora=False: merged here, so that the model's weights tell what was trained")
    return replace(
        recipe, bridge=replace(bridge, adapters=(), merge_lora=None), tuner=replace(tuner, adapter_load=None)
    )


def _few_rows(text: str, most: int) -> str | None:
    """The first rows of a local dataset; None for one that is not here."""
    where, _, count = text.partition("#")
    rows = min(int(count), most) if count.isdigit() else most
    if where.startswith("example:"):
        return f"{where}#{rows}"
    path = Path(where).expanduser()
    return f"{path.absolute()}#{rows}" if path.exists() else None


def _few_steps(recipe: Recipe, whole: Recipe, shape: ModelShape, *, steps: int, world: int, vp: int) -> Recipe:
    parallel, layout = recipe.parallel, layout_of(whole, shape)
    pp = parallel.pipeline_model_parallel_size
    dp = world // (parallel.tensor_model_parallel_size * pp * parallel.context_parallel_size)
    accumulation = min(layout.num_microbatches if layout else 1, 2)
    if pp > 1:
        accumulation = pp * max(1, accumulation // pp)
    micro = min(recipe.batch.micro_batch_size, 2)
    rate, checkpoint, precision = recipe.learning_rate, recipe.checkpoint, recipe.precision
    return replace(
        recipe,
        batch=replace(recipe.batch, micro_batch_size=micro, global_batch_size=micro * dp * accumulation),
        training=replace(recipe.training, train_iters=steps, max_epochs=None),
        learning_rate=replace(
            rate,
            lr_decay_iters=None,
            lr_warmup_iters=min(rate.lr_warmup_iters, steps // 4),
            lr_wsd_decay_iters=rate.lr_wsd_decay_iters and min(rate.lr_wsd_decay_iters, steps // 4),
        ),
        precision=replace(precision, initial_loss_scale=max(LOSS_SCALE, precision.min_loss_scale)),
        evaluation=replace(recipe.evaluation, eval_interval=steps // 2, eval_iters=1),
        logging=replace(recipe.logging, report_to=None),
        watching=replace(recipe.watching, profile_steps=None, profile_ranks=(0,), callbacks=()),
        checkpoint=replace(
            checkpoint,
            save=None,
            load=None,
            finetune=False,
            save_strategy="steps",
            metric_for_best_model=None,
            greater_is_better=None,
            save_interval=SAVE_EVERY,
            save_retain_interval=None,
            save_safetensors_interval=None,
            save_total_limit=None,
            save_safetensors=True,
        ),
    )


def _without_faults(recipe: Recipe, notes: list[str]) -> Small:
    """Resets parameters that break a rule of the small recipe to their defaults, and names them."""
    for _ in range(2):
        faults = check(recipe, declared_shape(recipe))
        for fault in faults:
            recipe = _reset(recipe, fault, notes)
    if faults := check(recipe, declared_shape(recipe)):
        raise ConfigError(f"this recipe cannot be made small enough to rehearse: {'; '.join(map(str, faults))}")
    return Small(recipe, tuple(dict.fromkeys(notes)))


def _reset(recipe: Recipe, fault: Fault, notes: list[str]) -> Recipe:
    for parameter in parameters(Recipe):
        if parameter.dotted == fault.field:
            group = getattr(recipe, parameter.group)
            notes.append(f"{parameter.dotted}={getattr(group, parameter.name)!r}: {fault.rule}")
            return replace(recipe, **{parameter.group: replace(group, **{parameter.name: parameter.default})})
    return recipe
