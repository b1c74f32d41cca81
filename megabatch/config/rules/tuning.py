"""What is trained: parameters of LoRA and of freezing, each where it has an effect; names are checked elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from megabatch.config.declare import Parameter, parameters
from megabatch.config.recipe import Recipe
from megabatch.config.torch_dtype import torch_dtype
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

LORA = (
    "tuner.target_modules", "tuner.target_regex", "tuner.modules_to_save", "tuner.lora_rank", "tuner.lora_alpha",
    "tuner.lora_dropout", "tuner.lora_dtype", "tuner.lora_bias", "tuner.use_rslora", "tuner.init_lora_weights",
    "tuner.lora_fused", "tuner.adapter_load", "bridge.adapters",
)  # fmt: skip
"""Parameters of adapters."""
FREEZING = (
    "tuner.freeze_parameters", "tuner.freeze_parameters_regex", "tuner.freeze_parameters_ratio",
    "tuner.trainable_parameters", "tuner.trainable_parameters_regex",
)  # fmt: skip
"""Parameters of full training with frozen parts."""
_EMBEDDING, _OUTPUT = ("word_embeddings", "embed_tokens"), ("output_layer", "lm_head")


def each_kind_has_its_own_parameters(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    is_lora = recipe.tuner.tuner_type == "lora"
    idle, needed = (FREEZING, "full") if is_lora else (LORA, "lora")
    for parameter in _declared(idle):
        value = getattr(getattr(recipe, parameter.group), parameter.name)
        if value != parameter.default:
            yield Fault(parameter.dotted, value, f"needs tuner_type={needed!r}, which is {recipe.tuner.tuner_type!r}")
    if not is_lora and recipe.bridge.merge_lora:
        yield Fault("bridge.merge_lora", True, "needs tuner_type='lora', which is 'full'", try_=(None,))


@cache
def _declared(names: tuple[str, ...]) -> tuple[Parameter, ...]:
    """Kept, because a search for a layout asks thousands of times."""
    return tuple(parameter for parameter in parameters(Recipe) if parameter.dotted in names)


def one_adapter_to_start_from(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    adapters, load = recipe.bridge.adapters, recipe.tuner.adapter_load
    if len(adapters) > 1:
        yield Fault("bridge.adapters", adapters, "must be one adapter, which is trained; merge the others first")
    if adapters and load is not None:
        yield Fault("bridge.adapters", adapters, f"and tuner.adapter_load={load!r} both begin the run; give one")


def tied_embeddings_are_one_tensor(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    tuner = recipe.tuner
    if tuner.tuner_type != "lora" or shape is None or shape.untie_embeddings_and_output_weights:
        return
    tied = f"and {shape.model_type}'s output layer is its embedding"
    if named := [name for name in tuner.target_modules if name in _OUTPUT]:
        rule = f"has {named[0]!r}, {tied}, without a weight of its own to adapt; adapt the embedding (all-embedding)"
        yield Fault("tuner.target_modules", tuner.target_modules, rule)
    if saved := [name for name in tuner.modules_to_save if name in (*_EMBEDDING, *_OUTPUT)]:
        rule = (
            f"has {saved[0]!r}, {tied}: PEFT would train a copy beside it, and megatron-core both at once; "
            "adapt the embedding (all-embedding), or leave it out"
        )
        yield Fault("tuner.modules_to_save", tuner.modules_to_save, rule)


def adapters_have_the_dtype_of_the_model(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    wanted = recipe.tuner.lora_dtype
    if wanted is not None and shape is not None and wanted != (dtype := torch_dtype(recipe, shape)):
        rule = (
            f"must be the model's torch_dtype, {dtype!r}: an adapter computes with the inputs of its layer, and the "
            "optimizer keeps its numbers in fp32 anyway"
        )
        yield Fault("tuner.lora_dtype", wanted, rule, try_=(None,))


RULES = (
    each_kind_has_its_own_parameters,
    one_adapter_to_start_from,
    tied_embeddings_are_one_tensor,
    adapters_have_the_dtype_of_the_model,
)
