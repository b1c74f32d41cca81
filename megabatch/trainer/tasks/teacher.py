"""The model that a student learns from: another one of any shape, at the run's layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.config.run import RunConfig
from megabatch.converters.hf_model import open_hf_model
from megabatch.data.run_tokenizer import folder_of
from megabatch.errors import ConfigError, MegabatchError
from megabatch.trainable import VOCABULARY_ROUNDED
from megabatch.trainer.assemble import frozen_model
from megabatch.trainer.engine import Engine, vocab_shard
from megabatch.trainer.model.build import Model, padded_vocab_size
from megabatch.trainer.model.heads import Head
from megabatch.trainer.model_source import ModelSource, model_source
from megabatch.trainer.offload import Offload, tensors_of
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.teachers_distribution import OutputLayer
from megabatch.trainer.sync.open import in_ranks
from megabatch.trainer.sync.rollouts import Rollouts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model, and where it came from."""

    model: Model
    source: ModelSource

    def engines(self, run: RunConfig, ranks: Ranks) -> Rollouts:
        """Engines that answer with the teacher's weights, which they get once; collective. Raises: RolloutError."""
        found = in_ranks(run, self.source, ranks, positions=self.model.shape.max_position_embeddings)
        found.update(Engine(self.model, ranks), 0)
        return found

    def frozen(self, run: RunConfig, ranks: Ranks) -> Model:
        """The model as `Parts.frozen` has it: with `offload_teacher_model` and CUDA it moves to host memory now, and
        is on the device only inside its own passes."""
        if not (run.recipe.gkd.offload_teacher_model and ranks.device.type == "cuda"):
            return self.model
        offload = Offload(tensors_of(self.model.wrapped), constant=True)
        offload.to_host()
        logger.info("the teacher's %.2f GiB are in host memory between its passes", offload.bytes / 2**30)
        return replace(self.model, offload=offload)

    def taken_output_layer(self, run: RunConfig, ranks: Ranks) -> OutputLayer:
        """Takes the output layer out of the model, whose output are then its hidden states; collective.

        The layer is split over tensor-parallel ranks as the student's, though vocabularies may be padded differently.
        """
        model, weight_RH = self.model, None
        last = model.chunks[-1]
        if last.post_process:
            weight_VH = last.shared_embedding_or_output_weight() if model.shape.ties_output_layer else None
            weight_VH = last.output_layer.weight if weight_VH is None else weight_VH
            weight_RH = _as_the_students(weight_VH.detach(), model, run, ranks)
            if model.shape.ties_output_layer and run.recipe.gkd.offload_teacher_model:
                weight_RH = weight_RH.clone()  # the embedding leaves the device, and this stays
            last.output_layer = Head(model.config, 0)
        return OutputLayer(
            hidden_size=model.shape.hidden_size,
            dtype=model.config.params_dtype,
            vocab_size=model.shape.vocab_size,
            weight_RH=weight_RH,
        )


def teacher_of(run: RunConfig, name: str, source: ModelSource, ranks: Ranks) -> Teacher:
    """A frozen model from a folder or a hub; collective. Args: source: the student's.

    Raises: ConfigError, ConversionError on every rank, also for a family that is not `teacher_model_type`, and for a
    vocabulary that is not the student's.
    """
    group = run.recipe.gkd
    folder = ranks.on_main(lambda: folder_of(name, run, revision=group.teacher_model_revision))
    shape = open_hf_model(folder, compare_duplicates=False).shape
    if group.teacher_model_type not in (None, shape.model_type):
        raise ConfigError(
            f"gkd.teacher_model_type={group.teacher_model_type!r} is not that of gkd.teacher_model={name!r}, which is "
            f"{shape.model_type!r}; give that, or leave it out"
        )
    if abs(shape.vocab_size - run.shape.vocab_size) >= VOCABULARY_ROUNDED:
        raise ConfigError(
            f"gkd.teacher_model={name!r} has {shape.vocab_size:,} tokens and the student {run.shape.vocab_size:,}: "
            "distillation compares tokens by their ids, so both must have one tokenizer"
        )
    recipe = run.recipe
    parallel = recipe.parallel
    if not shape.num_experts:
        parallel = replace(parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    alone = replace(
        recipe,
        model=replace(
            recipe.model,
            model=str(folder),
            model_type=None,
            tokenizer=str(source.tokenizer),
            padded_vocab_size=None,
            new_special_tokens=(),
        ),
        parallel=replace(
            parallel,
            decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
            pipeline_model_parallel_layout=None,
        ),
    )
    own = replace(run, recipe=alone, shape=shape)
    logger.info("the teacher is %s", name)
    try:
        found = model_source(own, ranks)
        return Teacher(frozen_model(own, ranks, found), found)
    except MegabatchError as e:
        raise type(e)(f"gkd.teacher_model={name!r}: {e}") from e


def _as_the_students(weight_VH: Tensor, teacher: Model, run: RunConfig, ranks: Ranks) -> Tensor:
    padded = run.recipe.model.padded_vocab_size or padded_vocab_size(run.shape.vocab_size, ranks.tp_size)
    shard = vocab_shard(padded, min(run.shape.vocab_size, teacher.shape.vocab_size), ranks)
    if shard.size == len(weight_VH):
        return weight_VH[: shard.real]
    parts = [torch.empty_like(weight_VH) for _ in range(ranks.tp_size)]
    dist.all_gather(parts, weight_VH.contiguous(), group=ranks.tp)
    return torch.cat(parts)[shard.start : shard.start + shard.real].clone()
