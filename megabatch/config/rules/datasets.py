"""Rules for what a run reads and how rows are made of it."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.loss_scales import parse
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape
from megabatch.tasks import TASKS


def data_is_given(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    data = recipe.data
    if not data.dataset:
        yield Fault("data.dataset", None, "is missing: name at least one file, folder or hub dataset", bare=True)
    if data.val_dataset and data.split_dataset_ratio:
        rule = "has no effect with val_dataset; give one of them"
        yield Fault("data.split_dataset_ratio", data.split_dataset_ratio, rule, try_=(0,))
    if data.packing_length is not None and not data.packing:
        yield Fault("data.packing_length", data.packing_length, "needs packing, which is False")


def only_documents_are_cut_into_pieces(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    if recipe.data.truncation_strategy == "split" and not _reads_documents(recipe):
        rule = f"is for task='pt', not {recipe.task!r}: an answer's later pieces would lack the question"
        yield Fault("data.truncation_strategy", "split", rule, try_=("right", "delete"))


def _reads_documents(recipe: Recipe) -> bool:
    return recipe.kind is not None and recipe.kind.rows == "documents"


def padding_and_packing_agree(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    if recipe.data.packing and not recipe.data.padding_free:
        yield Fault("data.padding_free", False, "pads samples to one length, and packing=True lays them end to end")


def one_pass_has_one_epoch(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    epochs = recipe.training.max_epochs
    if recipe.data.dataloader_type == "single" and (epochs or 1) > 1:
        rule = f"is one pass over the data, and max_epochs={epochs}"
        yield Fault("data.dataloader_type", "single", rule, try_=("cyclic",))


def streaming_needs_no_whole_dataset(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    data, training = recipe.data, recipe.training
    if not data.streaming:
        if data.dataloader_type == "external":
            yield Fault("data.dataloader_type", "external", "is what streaming=True uses", try_=("cyclic", "single"))
        return
    if training.train_iters is None:
        yield Fault("data.streaming", True, "needs train_iters: the length of a stream is not known")
    if recipe.kind is not None and not recipe.kind.streams:
        streaming = " and ".join(task.name for task in TASKS if task.streams)
        yield Fault("data.streaming", True, f"is for {streaming}, not {recipe.kind.name}", try_=(False,))
    if training.max_epochs is not None:
        rule = f"and max_epochs={training.max_epochs}: the length of a stream is not known; set train_iters alone"
        yield Fault("data.streaming", True, rule)
    if data.split_dataset_ratio:
        rule = "needs all samples before training, and streaming=True reads them later; give val_dataset"
        yield Fault("data.split_dataset_ratio", data.split_dataset_ratio, rule, try_=(0,))
    if data.dataloader_type == "single":
        rule = "ends with the data, and streaming=True goes on from its beginning"
        yield Fault("data.dataloader_type", "single", rule, try_=("external",))
    for name in ("group_by_length", "pad_to_max_length"):
        if getattr(data, name):
            yield Fault(f"data.{name}", True, "needs the lengths of all samples, which streaming=True does not know")
    if training.enable_channel_loss:
        rule = "names its metrics by the channels of all samples, which streaming=True does not know"
        yield Fault("training.enable_channel_loss", True, rule)


def scales_weigh_conversations(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    text = recipe.data.loss_scale
    if text is not None and _reads_documents(recipe) and parse(text).scales:
        rule = "weighs parts of an assistant's turns, and task='pt' reads plain texts, of which every token is learned"
        yield Fault("data.loss_scale", text, rule, try_=(None,))


def template_variables_are_said_once(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    data = recipe.data
    if data.enable_thinking is not None and "enable_thinking" in (data.chat_template_kwargs or {}):
        rule = "and chat_template_kwargs both set it; leave one out"
        yield Fault("data.enable_thinking", data.enable_thinking, rule, try_=(None,))
    if _reads_documents(recipe):
        for name in ("enable_thinking", "chat_template_kwargs"):
            if (value := getattr(data, name)) is not None:
                yield Fault(f"data.{name}", value, "has no effect: pt renders no chat template", try_=(None,))


def seq_length_says_nothing_else(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    wanted, longest = recipe.data.seq_length, recipe.data.max_length
    if wanted is not None and wanted != longest:
        rule = f"must equal max_length={longest}, which sets how long samples may be"
        yield Fault("data.seq_length", wanted, rule, try_=(f"max_length={wanted}",))


RULES = (
    data_is_given,
    only_documents_are_cut_into_pieces,
    scales_weigh_conversations,
    streaming_needs_no_whole_dataset,
    padding_and_packing_agree,
    one_pass_has_one_epoch,
    template_variables_are_said_once,
    seq_length_says_nothing_else,
)
