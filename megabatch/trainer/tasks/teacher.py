"""The model that a student learns from: another one of any shape, at the run's layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megabatch.config.moe import MoE
from megabatch.config.recipe import Recipe
from megabatch.config.rules.second_layouts import lacks_tokens, model_divides
from megabatch.config.run import RunConfig, derived_moe
from megabatch.config.second_layouts import TEACHER
from megabatch.converters.hf_model import HfModel, open_hf_model
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.errors import ConfigError, MegabatchError
from megabatch.plan.shape import ModelShape
from megabatch.trainable import VOCABULARY_ROUNDED
from megabatch.trainer.assemble import frozen_model, layout_beside
from megabatch.trainer.engine import Engine, vocab_shard
from megabatch.trainer.model.build import Model, padded_vocab_size
from megabatch.trainer.model.heads import Head
from megabatch.trainer.model_source import ModelSource, model_folder, model_source
from megabatch.trainer.offload import Offload, tensors_of
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.teachers_distribution import OutputLayer
from megabatch.trainer.sync.open import in_ranks
from megabatch.trainer.sync.rollouts import Rollouts
from megabatch.trainer.weights import TORCH_DTYPES

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

    def beside(self, others: Sequence[Teacher]) -> None:
        """Raises: ConfigError unless all have vocabularies of one size, over which each distribution is normalised."""
        for other in others:
            if (own := self.model.shape.vocab_size) != (size := other.model.shape.vocab_size):
                raise ConfigError(
                    f"gkd.teacher_model names teachers with {own:,} and {size:,} tokens; several teachers need "
                    "vocabularies of one size"
                )

    def frozen(self, run: RunConfig, ranks: Ranks) -> Model:
        """The model as `Parts.frozen` has it: with `offload_teacher_model` and CUDA it moves to host memory now, and
        is on the device only inside its own passes."""
        if not (run.recipe.gkd.offload_teacher_model and ranks.device.type == "cuda"):
            return self.model
        offload = Offload(tensors_of(self.model.chunks), values="constant")
        offload.to_host()
        logger.info("the teacher's %.2f GiB are in host memory between its passes", offload.bytes / 2**30)
        return replace(self.model, offload=offload)

    def taken_output_layer(self, run: RunConfig, ranks: Ranks) -> OutputLayer:
        """Takes the output layer out of the model, whose output are then its hidden states.

        The layer is split over tensor-parallel ranks as the student's, whatever the teacher's own layout, and though
        vocabularies may be padded differently: each rank reads its part from the teacher's files.
        """
        model, weight_RH = self.model, None
        if model.chunks[-1].post_process:
            model.chunks[-1].output_layer = Head(model.config, 0)
        if ranks.is_last_stage:
            padded = run.recipe.model.padded_vocab_size or padded_vocab_size(run.shape.vocab_size, ranks.tp_size)
            shard = vocab_shard(padded, min(run.shape.vocab_size, model.shape.vocab_size), ranks)
            rows = (shard.start, shard.start + shard.real)
            weight_RH = self._output_rows(rows).to(ranks.device, model.config.params_dtype)
        return OutputLayer(
            hidden_size=model.shape.hidden_size,
            dtype=model.config.params_dtype,
            vocab_size=model.shape.vocab_size,
            weight_RH=weight_RH,
        )

    def _output_rows(self, rows: tuple[int, int]) -> Tensor:
        """Rows of the output layer's weights as they are stored: [R, H]."""
        opened = self.source.weights
        assert isinstance(opened, HfModel), "a teacher has files"
        name = "embedding.word_embeddings.weight" if self.model.shape.ties_output_layer else "output_layer.weight"
        mapped = next(one for one in opened.tensors if one.name == name)
        (piece,) = mapped.pieces
        assert not mapped.strided and piece.index is None, "vocabularies are stored row by row"
        info = opened.folder.tensors[piece.hf]
        data = bytearray((rows[1] - rows[0]) * mapped.shape[1] * opened.folder.itemsize(piece.hf))
        first = piece.rows[0]
        opened.folder.read_into(piece.hf, memoryview(data), rows=(first + rows[0], first + rows[1]))
        return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(-1, mapped.shape[1])


def teacher_of(run: RunConfig, name: str, source: ModelSource, ranks: Ranks) -> Teacher:
    """A frozen model from a folder or a hub; collective. Args: source: the student's.

    Raises: ConfigError, ConversionError on every rank, also for a family that is not `teacher_model_type`, and for a
    vocabulary that is not the student's.
    """
    group = run.recipe.gkd
    folder = ranks.on_main(lambda: model_folder(name, run, revision=group.teacher_model_revision))
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
    if faults := [*model_divides(recipe, TEACHER, shape, chunks=run.layout.vp)]:
        raise ConfigError(faults)
    if shape.vocab_size < run.shape.vocab_size:
        rows = min(ranks.on_main(lambda: tokenizers.rows(source.tokenizer)), run.shape.vocab_size)
        if fault := lacks_tokens(name, shape, rows=rows, are_new=bool(recipe.model.new_special_tokens)):
            raise ConfigError([fault])
    alone = replace(
        recipe,
        model=replace(
            recipe.model,
            model=str(folder),
            model_type=None,
            padded_vocab_size=None,
            new_special_tokens=(),
        ),
        moe=_experts(recipe, shape),
        training=replace(recipe.training, megatron_extra_kwargs=None),
    )
    own = replace(run, recipe=alone, shape=shape)
    logger.info("the teacher is %s", name)
    if recipe.training.megatron_extra_kwargs:
        logger.info("training.megatron_extra_kwargs are the student's alone; the teacher is built without them")
    try:
        found = model_source(own, ranks, tokenizer=source.tokenizer)
        own, its_ranks = layout_beside(own, ranks, TEACHER)
        return Teacher(frozen_model(own, its_ranks, found), found)
    except MegabatchError as e:
        raise type(e)(f"gkd.teacher_model={name!r}: {e}") from e


def _experts(recipe: Recipe, shape: ModelShape) -> MoE:
    """A teacher's: the student may have none, and no token of a teacher is dropped at a capacity."""
    return replace(derived_moe(recipe, shape), moe_expert_capacity_factor=None, moe_pad_expert_input_to_capacity=False)
