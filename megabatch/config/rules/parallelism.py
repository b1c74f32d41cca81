"""What must divide for tensor, sequence and expert parallelism, and which overlaps need which."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from megabatch.config.recipe import Recipe
from megabatch.config.second_layouts import row_units
from megabatch.config.shared_prompts import why_local_layers
from megabatch.errors import Fault
from megabatch.plan.batch import nearest_divisors, nearest_multiples
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_TP = "parallel.tensor_model_parallel_size"
_EP = "parallel.expert_model_parallel_size"
_ETP = "parallel.expert_tensor_parallel_size"


def tensor_parallel_divides(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    tp = recipe.parallel.tensor_model_parallel_size
    if shape is None:
        return
    sizes = {"num_attention_heads": shape.num_attention_heads, "ffn_hidden_size": shape.ffn_hidden_size}
    if all(shape.is_moe_layer(layer) for layer in range(shape.num_layers)):
        del sizes["ffn_hidden_size"]
    common = gcd(*sizes.values())
    fitting = [size for size in nearest_divisors(tp, of=common, count=common) if _cuts_groups(shape, size)][:2]
    for name, size in sizes.items():
        if size % tp:
            yield Fault(_TP, tp, f"must divide the model's {name}={size}", try_=fitting)
    if not _cuts_groups(shape, tp):
        rule = f"must divide the model's num_query_groups={shape.num_query_groups} or be a multiple of it"
        yield Fault(_TP, tp, rule, try_=fitting)


def _cuts_groups(shape: ModelShape, tp: int) -> bool:
    """Whether each rank has whole groups, or several ranks share one, whose rows are then cut evenly."""
    groups = shape.num_query_groups
    return groups % tp == 0 or (tp % groups == 0 and 2 * groups * shape.kv_channels % tp == 0)


def vocabulary_divides(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    tp, padded = recipe.parallel.tensor_model_parallel_size, recipe.model.padded_vocab_size
    if padded is None:
        return
    if padded % tp:
        rule = f"must be a multiple of tensor_model_parallel_size={tp}"
        yield Fault("model.padded_vocab_size", padded, rule, try_=nearest_multiples(padded, of=tp))
    if shape is not None and padded < shape.vocab_size:
        rule = f"must be at least the model's vocab_size={shape.vocab_size}"
        yield Fault("model.padded_vocab_size", padded, rule, try_=(-(-shape.vocab_size // tp) * tp,))


def sequence_divides(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """A packed row, or a length told to megatron-core, is cut over the tp ranks (sequence parallel) and cp ranks."""
    data, (_, unit) = recipe.data, row_units(recipe)
    lengths = {"seq_length": data.seq_length}
    if data.packing:
        lengths["packing_length" if data.packing_length else "max_length"] = data.packing_length or data.max_length
    for name, length in lengths.items():
        if length is not None and length % unit:
            rule = f"must be a multiple of {unit}, the parts a sequence is cut into by tp and cp"
            yield Fault(f"data.{name}", length, rule, try_=nearest_multiples(length, of=unit))


def sequence_parallel_needs_tp(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.parallel.sequence_parallel and recipe.parallel.tensor_model_parallel_size == 1:
        rule = "needs tensor_model_parallel_size above 1, which is 1"
        yield Fault("parallel.sequence_parallel", True, rule, try_=(False,))


def experts_with_tp_need_sequence_parallel(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    """megatron-core trains mixtures of experts under tensor parallelism only with sequence parallelism."""
    parallel = recipe.parallel
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    experts = ep > 1 or (shape is not None and shape.num_experts is not None)
    if experts and tp > 1 and not parallel.sequence_parallel:
        rule = f"must be true for a mixture of experts with tensor_model_parallel_size={tp}"
        yield Fault("parallel.sequence_parallel", False, rule, try_=(True,))


def experts_divide(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    ep, etp = recipe.parallel.expert_model_parallel_size, recipe.parallel.expert_tensor_parallel_size
    if shape is None:
        return
    if shape.num_experts is None:
        for field, size in ((_EP, ep), (_ETP, etp)):
            if size > 1:
                yield Fault(field, size, f"needs a mixture of experts, but {shape.model_type} has none", try_=(1,))
        return
    if shape.num_experts % ep:
        rule = f"must divide the model's num_experts={shape.num_experts}"
        ranks = recipe.resources.world_size // recipe.parallel.pipeline_model_parallel_size
        yield Fault(_EP, ep, rule, try_=nearest_divisors(ep, of=gcd(shape.num_experts, max(1, ranks // etp))))
    width = shape.moe_ffn_hidden_size or shape.ffn_hidden_size
    if width % etp:
        rule = f"must divide the model's moe_ffn_hidden_size={width}"
        yield Fault(_ETP, etp, rule, try_=nearest_divisors(etp, of=width))


def expert_ranks_divide(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Experts are laid over the same ranks of a pipeline stage as everything else: ep * etp must divide them."""
    parallel, world = recipe.parallel, recipe.resources.world_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    ranks, left = divmod(world, parallel.pipeline_model_parallel_size)
    if left or ranks % (ep * etp) == 0:
        return
    rule = f"with expert_tensor_parallel_size={etp} must divide the {ranks} ranks of a pipeline stage (tp*dp*cp)"
    fitting = [size for size in nearest_divisors(ep, of=ranks, count=ranks) if ranks % (size * etp) == 0]
    yield Fault(_EP, ep, rule, try_=fitting[:2])


def exchange_has_its_kernels(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """`cp_comm_type` is Transformer Engine's, which needs GPUs; with a2a each rank has a part of the heads."""
    parallel, field = recipe.parallel, "parallel.cp_comm_type"
    how, cp, tp = parallel.cp_comm_type, parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if how is None:
        return
    if cp == 1:
        yield Fault(field, how, "needs context_parallel_size above 1, which is 1", try_=(None,))
    if (why := why_local_layers(recipe, shape)) is not None:
        yield Fault(field, how, f"is Transformer Engine's, which this run does not use ({why})", try_=(None,))
    for name in ("num_attention_heads", "num_query_groups"):
        count = getattr(shape, name, cp * tp)
        if how == "a2a" and count % (cp * tp):
            rule = f"needs the model's {name}={count} to be a multiple of cp*tp={cp}*{tp}"
            yield Fault(field, how, rule, try_=("p2p",))


def attention_knows_of_context(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Transformer Engine's unfused attention has no context parallelism; ours takes no notice of the backend."""
    backend, cp = recipe.kernels.attention_backend, recipe.parallel.context_parallel_size
    if cp > 1 and backend in ("unfused", "local") and why_local_layers(recipe, shape) is None:
        rule = f"has no context parallelism (context_parallel_size={cp}) in Transformer Engine"
        yield Fault("kernels.attention_backend", backend, rule, try_=("flash", "fused"))


def overlaps_have_their_needs(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    parallel = recipe.parallel
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        rule = "needs use_distributed_optimizer and overlap_grad_reduce"
        yield Fault("parallel.overlap_param_gather", True, rule, try_=(False,))
    if parallel.tp_comm_overlap:
        rule = "needs Transformer Engine's user buffers, which the trainer does not set up"
        yield Fault("parallel.tp_comm_overlap", True, rule, try_=(False,))


def distributed_optimizer_takes_adam(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    name = recipe.optimizer.optimizer
    if name != "adam" and recipe.parallel.use_distributed_optimizer:
        rule = "needs parallel.use_distributed_optimizer=False: megatron-core's distributed optimizer has Adam alone"
        yield Fault("optimizer.optimizer", name, rule, try_=("adam",))


RULES = (
    tensor_parallel_divides,
    vocabulary_divides,
    sequence_divides,
    sequence_parallel_needs_tp,
    experts_with_tp_need_sequence_parallel,
    experts_divide,
    expert_ranks_divide,
    exchange_has_its_kernels,
    attention_knows_of_context,
    overlaps_have_their_needs,
    distributed_optimizer_takes_adam,
)
