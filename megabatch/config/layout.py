"""From a recipe's groups to the plan's numbers: layout and pipeline chunks."""

from __future__ import annotations

from megabatch.config.parallel import Parallel
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError
from megabatch.plan import layout as plan
from megabatch.plan.pipeline_layout import parse
from megabatch.plan.shape import ModelShape
from megabatch.plan.stages import Chunk, chunks_of_counts, chunks_of_stages, even_counts, uneven_counts


def layout_of(recipe: Recipe, shape: ModelShape | None) -> plan.Layout | None:
    """The recipe's layout, or None where something does not divide (the rules say what)."""
    parallel = recipe.parallel
    return plan.layout(
        world_size=recipe.resources.world_size,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        vp=virtual_stages(parallel, shape.num_layers if shape else None),
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        global_batch_size=recipe.batch.global_batch_size,
    )


def virtual_stages(parallel: Parallel, num_layers: int | None) -> int:
    """Chunks on each pipeline stage; 1 where there is no interleaving or it cannot be told."""
    pp = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        return max(1, len(_stages(parallel) or ()) // pp)
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        return parallel.num_virtual_stages_per_pipeline_rank
    if parallel.num_layers_per_virtual_pipeline_stage is not None and num_layers is not None:
        return max(1, counted_layers(parallel, num_layers) // pp // parallel.num_layers_per_virtual_pipeline_stage)
    return 1


def counted_layers(parallel: Parallel, num_layers: int) -> int:
    """Layers that an even split counts: embedding and loss too where they are accounted for."""
    return num_layers + parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split


def chunks_of(parallel: Parallel, num_layers: int) -> tuple[Chunk, ...] | None:
    """Which layers each pipeline rank's chunks hold, or None where they do not divide (the rules say why)."""
    pp, vp = parallel.pipeline_model_parallel_size, virtual_stages(parallel, num_layers)
    if parallel.pipeline_model_parallel_layout is not None:
        stages = _stages(parallel)
        whole = stages is not None and len(stages) % pp == 0 and "".join(stages).count("t") == num_layers
        return chunks_of_stages(stages, pp=pp) if whole and stages else None
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        counts = uneven_counts(num_layers, pp=pp, vp=vp, first=first, last=last)
    else:
        counts = even_counts(
            num_layers,
            pp=pp,
            vp=vp,
            embedding=parallel.account_for_embedding_in_pipeline_split,
            loss=parallel.account_for_loss_in_pipeline_split,
        )
    return chunks_of_counts(counts, pp=pp) if sum(counts) == num_layers and min(counts) >= 0 else None


def _stages(parallel: Parallel) -> tuple[str, ...] | None:
    try:
        return parse(parallel.pipeline_model_parallel_layout or "")
    except ConfigError:
        return None
