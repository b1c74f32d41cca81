"""Saving the live model as a Hugging Face folder: every owner of tensors writes its own files, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabatch.config.run import RunConfig
from megabatch.converters.atomic import noting, replacing
from megabatch.converters.auxiliary_files import carry_over
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.family import Family
from megabatch.converters.hf_model import HfModel
from megabatch.converters.mapping import Mapped
from megabatch.converters.safetensors_io import ShardFile, Writer, split_shards, write_index
from megabatch.converters.shards import HfRows
from megabatch.errors import MegabatchError
from megabatch.saved.manifest import File
from megabatch.trainer.exports.chat import ChatExport, has_template
from megabatch.trainer.exports.classifier import classifier_config
from megabatch.trainer.exports.export import Export
from megabatch.trainer.exports.padding import padding_of
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.weights import SAFETENSORS_DTYPES, export, in_first_replica, placed, tensor_split


@dataclass(frozen=True, slots=True)
class HfExport(Export):
    """How this run's model becomes a Hugging Face folder."""

    family: Family
    table: Sequence[Mapped]
    config_folder: Path
    """Source of config.json, tokenizer and the other auxiliary files."""
    max_shard_size: str
    chat: ChatExport | None = None
    """The tokenizer used in training; None copies that of `config_folder` unchanged."""
    config_of: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """What becomes of the folder's config.json."""
    is_bare: bool = False
    """Whether tensors are named as a base model's, without `model.`."""

    def save(self, model: Model, ranks: Ranks, directory: Path) -> dict[str, File]:
        entries = self._own_entries(model, ranks)
        files, everyone = self._files(entries)
        written, error = _write(self._exported(model, ranks), directory, files)
        if ranks.is_main and error is None:
            rest, error = self._write_rest(model.config.params_dtype, directory, everyone)
            written |= rest
        ranks.raise_together(error)
        return written

    def copied(self, model: Model, ranks: Ranks) -> Callable[[Path], dict[str, File]]:
        files, everyone = self._files(self._own_entries(model, ranks))
        tensors = [(mapped, [_copy(row) for row in rows]) for mapped, rows in self._exported(model, ranks)]
        dtype, is_main = model.config.params_dtype, ranks.is_main

        def write(directory: Path) -> dict[str, File]:
            written, error = _write(((mapped, iter(rows)) for mapped, rows in tensors), directory, files)
            if is_main and error is None:
                rest, error = self._write_rest(dtype, directory, everyone)
                written |= rest
            if error is not None:
                raise error
            return written

        return write

    def _exported(self, model: Model, ranks: Ranks) -> Iterator[tuple[Mapped, Iterator[HfRows]]]:
        for mapped, rows in export(model, self.table, ranks):
            yield mapped, (replace(row, hf=self._name(row.hf)) for row in rows)

    def _name(self, tensor: str) -> str:
        return tensor.removeprefix("model.") if self.is_bare else tensor

    def _own_entries(self, model: Model, ranks: Ranks) -> dict[str, TensorInfo]:
        """The Hugging Face tensors that this rank writes, in the order in which the export yields them."""
        shapes = self.family.hf_tensors(model.shape)
        dtype = SAFETENSORS_DTYPES[model.config.params_dtype]
        return {
            self._name(piece.hf): TensorInfo(dtype, shapes[piece.hf])
            for item in placed(model, self.table, ranks)
            if not item.is_copy and in_first_replica(item.mapped, ranks) and tensor_split(item.mapped, ranks)[0] == 0
            for piece in item.mapped.pieces
        }

    def _files(self, entries: Mapping[str, TensorInfo]) -> tuple[list[ShardFile], list[ShardFile]]:
        """(this rank's files, all ranks' files), named so that together they count from 1 to n."""
        mine = split_shards(entries, max_shard_size=self.max_shard_size) if entries else []
        gathered: list[list[ShardFile]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, mine)
        everyone = [file for files in gathered for file in files]
        if len(everyone) > 1:
            names = [f"model-{i:05d}-of-{len(everyone):05d}.safetensors" for i in range(1, len(everyone) + 1)]
            everyone = [ShardFile(name, file.entries) for name, file in zip(names, everyone, strict=True)]
        before = sum(len(files) for files in gathered[: dist.get_rank()])
        return everyone[before : before + len(mine)], everyone

    def _write_rest(
        self, dtype: torch.dtype, directory: Path, files: Sequence[ShardFile]
    ) -> tuple[dict[str, File], MegabatchError | None]:
        try:
            with noting() as written:
                write_index(directory, files)
                if self.chat is None:
                    carry_over(self.config_folder, directory, skip=("config.json",))
                else:
                    self.chat.write(self.config_folder, directory)
                config = self.config_of(json.loads((self.config_folder / "config.json").read_text(encoding="utf-8")))
                config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
                with replacing(directory / "config.json") as file:
                    file.write((json.dumps(config, indent=2) + "\n").encode())
        except (MegabatchError, OSError) as e:
            return {}, e if isinstance(e, MegabatchError) else MegabatchError(f"{directory} cannot be written: {e}")
        return {path.relative_to(directory).as_posix(): file for path, file in written.items()}, None


def hugging_face_export(run: RunConfig, source: ModelSource) -> HfExport:
    """The export of a run's whole model, with the tokenizer and the chat template that it is trained with."""
    table = source.family.tensors(run.shape)
    size = run.recipe.checkpoint.max_shard_size
    config_of = _config_of(run, source)
    is_bare = run.shape.num_labels == 0 and isinstance(source.weights, HfModel) and source.weights.is_bare
    return HfExport(source.family, table, source.config_folder, size, chat_of(run, source), config_of, is_bare)


def _config_of(run: RunConfig, source: ModelSource) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if run.shape.num_labels is None:
        return dict
    return partial(classifier_config, run, source) if run.shape.num_labels else partial(_base_config, run)


def _base_config(run: RunConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Of a model without an output layer, which transformers' AutoModel loads."""
    return {**config, "architectures": [run.shape.architecture]}


def chat_of(run: RunConfig, source: ModelSource) -> ChatExport:
    """The tokenizer and the chat template that a run is trained with."""
    rows, template = run.task.rows, run.recipe.data.template
    has_turns = rows != "documents" and (
        rows not in ("labelled", "ranked", "candidates") or has_template(source.tokenizer, template)
    )
    padding = None if run.shape.num_labels is None else padding_of(run, source)
    return ChatExport(
        source.tokenizer, template, has_turns=has_turns, padding=None if padding is None else padding.text
    )


def _copy(row: HfRows) -> HfRows:
    return replace(row, data=memoryview(bytes(row.data)))


def _write(
    tensors: Iterable[tuple[Mapped, Iterator[HfRows]]], directory: Path, files: Sequence[ShardFile]
) -> tuple[dict[str, File], MegabatchError | None]:
    """Writes this rank's tensors; after an error it stops writing but still takes part in the gathers."""
    file_of = {name: file for file in files for name in file.entries}
    writers: dict[str, Writer] = {}
    error: MegabatchError | None = None
    for _, rows in tensors:
        if error is not None:
            continue
        try:
            for row in rows:
                file = file_of[row.hf]
                if file.name not in writers:
                    writers[file.name] = Writer(directory / file.name, file.entries)
                writers[file.name].write(row.hf, row.data, row_start=row.row_start, index=row.index)
        except MegabatchError as e:
            error = e
    for writer in writers.values():
        try:
            writer.abort() if error is not None else writer.close()
        except MegabatchError as e:
            error = e
    return {} if error is not None else {name: writer.digests() for name, writer in writers.items()}, error
