"""vLLM inside the ranks of a run: what its engines are started with."""

from __future__ import annotations

import logging
from dataclasses import replace

from megabatch.config.grpo import Rollout
from megabatch.config.lengths import positions
from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.rollout.vllm.colocated import Colocated
from megabatch.rollout.vllm.engine_options import EngineOptions, room_for
from megabatch.rollout.vllm.leftovers import remove_leftovers
from megabatch.trainer.data.dataset import share_of
from megabatch.trainer.model.lora.lora import lora_of
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.sync.rollouts import Rollouts

logger = logging.getLogger(__name__)


def open_colocated(run: RunConfig, source: ModelSource, ranks: Ranks, *, tolerance: float) -> Rollouts:
    """Engines without weights, asleep where the run lets them sleep; collective. Raises: RolloutError."""
    rollout = run.recipe.rollout
    if rollout.sleep_level and ranks.device.type == "cpu":
        logger.info("rollout.sleep_level=%d has no effect here: on CPUs vLLM cannot sleep", rollout.sleep_level)
    options = options_of(
        rollout,
        folder=str(source.config_folder),
        dtype=resolved(run.recipe.model.torch_dtype),
        on_cpus=ranks.device.type == "cpu",
    )
    if rollout.vllm_enable_lora:
        layers = adapted(run, source)
        options = replace(options, lora_rank=room_for(run.recipe.tuner.lora_rank), lora_layers=layers)
    if ranks.place.local_rank == 0:
        remove_leftovers()
    engine = ranks.each(lambda: _started(options, rollout, ranks))
    return Rollouts(
        engine,
        ranks,
        source.family,
        experts=engine.experts,
        share=share_of(run, ranks),
        tolerance=tolerance,
        positions=positions(run.recipe, run.shape) - 1,  # vLLM scores what it draws one more token after
        ranks_of_engine=rollout.vllm_tensor_parallel_size,
        adapters=rollout.vllm_enable_lora,
    )


def _started(options: EngineOptions, rollout: Rollout, ranks: Ranks) -> Colocated:
    engine = Colocated(options, device=ranks.device, sleeps=rollout.sleep_level > 0)
    engine.sleep(rollout.sleep_level)
    return engine


def options_of(rollout: Rollout, *, folder: str, dtype: str, on_cpus: bool) -> EngineOptions:
    """On CPUs the default share of the memory stands for a bounded cache: vLLM would take it of the machine's."""
    share, default = rollout.vllm_gpu_memory_utilization, Rollout().vllm_gpu_memory_utilization
    return EngineOptions(
        model=folder,
        tensor_parallel_size=rollout.vllm_tensor_parallel_size,
        dtype=dtype,
        max_model_len=rollout.vllm_max_model_len,
        max_num_seqs=rollout.vllm_max_num_seqs,
        gpu_memory_utilization=None if on_cpus and share == default else share,
        enforce_eager=rollout.vllm_enforce_eager,
        enable_prefix_caching=rollout.vllm_enable_prefix_caching,
        disable_cascade_attn=rollout.vllm_disable_cascade_attn,
        more=rollout.vllm_engine_kwargs or {},
    )


def adapted(run: RunConfig, source: ModelSource) -> list[str]:
    """The last parts of the names of the layers that have adapters."""
    lora = lora_of(run.recipe.tuner, source.family.tensors(run.shape))
    assert lora is not None, "the rules let only runs with LoRA send adapters alone"
    return sorted({part.rpartition(".")[2] for target in lora.targets for part in target.parts})
