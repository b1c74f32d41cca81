"""An embedding model's folder: transformers' base model, and what sentence-transformers reads beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.converters.atomic import noting, replacing
from megabatch.converters.regular_files import read_regular
from megabatch.converters.safetensors_io.header import parse_object
from megabatch.errors import MegabatchError
from megabatch.saved.manifest import File
from megabatch.trainer.exports.export import Export
from megabatch.trainer.model.build import Model
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks

_SETTINGS = "config_sentence_transformers.json"


@dataclass(frozen=True, slots=True)
class EmbeddingExport(Export):
    """The model as another export writes it, with pooling and normalisation as sentence-transformers' modules."""

    model: Export
    pooling: str
    hidden_size: int
    max_length: int
    prompts: Mapping[str, Any]
    """What sentence-transformers puts before texts, as the model that the run started from has it."""

    def save(self, model: Model, ranks: Ranks, directory: Path) -> dict[str, File]:
        written, error = self.model.save(model, ranks, directory), None
        if ranks.is_main:
            try:
                written |= self._write(directory)
            except MegabatchError as e:
                error = e
        ranks.raise_together(error)
        return written

    def copied(self, model: Model, ranks: Ranks) -> Callable[[Path], dict[str, File]]:
        write, is_main = self.model.copied(model, ranks), ranks.is_main
        return lambda directory: write(directory) | (self._write(directory) if is_main else {})

    def _write(self, directory: Path) -> dict[str, File]:
        kinds = ("Transformer", "Pooling", "Normalize")
        paths = ("", "1_Pooling", "2_Normalize")
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ]
        pooling = {
            "word_embedding_dimension": self.hidden_size,
            "pooling_mode_cls_token": self.pooling == "cls",
            "pooling_mode_mean_tokens": self.pooling == "mean",
            "pooling_mode_lasttoken": self.pooling == "last",
            "include_prompt": True,
        }
        texts: dict[str, Any] = {
            "modules.json": modules,
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": False},
            _SETTINGS: {**self.prompts, "similarity_fn_name": "cosine"},
            "1_Pooling/config.json": pooling,
        }  # fmt: skip
        try:
            with noting() as found:
                for name, content in texts.items():
                    (directory / name).parent.mkdir(exist_ok=True)
                    with replacing(directory / name) as file:
                        file.write((json.dumps(content, indent=2) + "\n").encode())
        except OSError as e:
            raise MegabatchError(f"{directory} cannot be written: {e}") from e
        return {path.relative_to(directory).as_posix(): file for path, file in found.items()}


def embedding_export(run: RunConfig, source: ModelSource, model: Export) -> EmbeddingExport:
    group, length = run.recipe.embedding, resolved(run.recipe.data.max_length)
    return EmbeddingExport(model, group.pooling, run.shape.hidden_size, length, _prompts(source.config_folder))


def _prompts(folder: Path) -> dict[str, Any]:
    """Raises: ConversionError for a file that is no JSON object."""
    none: dict[str, Any] = {"prompts": {}, "default_prompt_name": None}
    if not (path := folder / _SETTINGS).is_file():
        return none
    found = parse_object(read_regular(path), path, what="settings")
    return {name: found.get(name, value) for name, value in none.items()}
