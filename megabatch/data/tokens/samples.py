"""Rows → samples: format, template, tokens, length limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megabatch.data.rows.files import Line, Origin, Row, parsed
from megabatch.data.rows.formats import Conversation, conversation_of
from megabatch.data.tokens import tokenizer
from megabatch.data.tokens.control_tokens import ControlTokens
from megabatch.data.tokens.fitting import check_column
from megabatch.data.tokens.templates import Encoded, LossScale, Template, encode_documents
from megabatch.errors import DataError

Truncation = Literal["delete", "left", "right", "split", "raise"]
"""What happens to a sample longer than max_length: dropped and counted, cut at an end or into pieces, an error."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example."""

    ids: np.ndarray
    """Token ids, int32 [n]."""
    weights: np.ndarray
    """Loss weight of predicting each token, float32 [n]; the first is 0."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Scalars that belong to the sample, for objectives and for error messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """Every setting that decides the tokens of a sample; pickled to the tokenising processes."""

    tokenizer: Path
    """Folder of the tokenizer."""
    task: Literal["pt", "sft"] = "sft"
    template: str | None = None
    system: str | None = None
    columns: Mapping[str, str] | None = None
    max_length: int | None = None
    """In tokens; None for no limit."""
    truncation_strategy: Truncation = "delete"
    loss_scale: LossScale = "default"
    sanitize_control_tokens: bool = True
    """Control tokens in the data are tokenised as text."""

    def __post_init__(self) -> None:
        # Read-only views of a mapping can be neither pickled nor written as JSON.
        object.__setattr__(self, "columns", dict(self.columns or {}))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples of a few rows, and what became of the others."""

    samples: list[Encoded]
    origins: list[Origin]
    """Of each sample."""
    dropped: Counter[str]
    """Reason → rows."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What the rows have and nobody reads → rows."""

    def columns(self) -> Columns:
        """The same in a few arrays, which are quick to send and to write."""
        files = {(o.file, o.is_line): 0 for o in self.origins}
        for number, file in enumerate(files):
            files[file] = number
        lengths: np.ndarray = np.array([len(sample.ids) for sample in self.samples], np.int32)
        weights: np.ndarray = np.concatenate([np.zeros(0, np.float32), *(sample.weights for sample in self.samples)])
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return Columns(
            ids=np.concatenate([np.zeros(0, np.int32), *(sample.ids for sample in self.samples)]),
            weights=weights,
            lengths=lengths,
            sums=np.add.reduceat(weights, starts, dtype=np.float64) if len(starts) else np.zeros(0),
            origins=np.array([(files[o.file, o.is_line], o.number) for o in self.origins], np.int32).reshape(-1, 2),
            files=list(files),
            dropped=self.dropped,
            remarks=self.remarks,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """A chunk with its samples one after the other."""

    ids: np.ndarray
    """int32 [tokens]"""
    weights: np.ndarray
    """float32 [tokens]"""
    lengths: np.ndarray
    """Tokens of each sample, int32 [samples]."""
    sums: np.ndarray
    """Sum of the weights of each sample, float64 [samples]."""
    origins: np.ndarray
    """Number of its file in `files`, and line or row: int32 [samples, 2]."""
    files: list[tuple[str, bool]]
    """File and `is_line` of the origins."""
    dropped: Counter[str]
    remarks: Counter[str]


class Encoder:
    """Turns rows into samples; loads the tokenizer once."""

    def __init__(self, encoding: Encoding) -> None:
        """Raises: DataError for the tokenizer or the template."""
        self.encoding = encoding
        self.tokenizer = tokenizer.load(encoding.tokenizer)
        if encoding.task == "pt" and self.tokenizer.eos_token_id is None:
            raise DataError(
                f"model.tokenizer: {encoding.tokenizer} has no eos_token, which ends every document of a pretraining "
                f"run; set it in tokenizer_config.json"
            )
        sanitize = encoding.sanitize_control_tokens
        self._control = ControlTokens(self.tokenizer) if encoding.task == "pt" and sanitize else None
        self.template = (
            None
            if encoding.task == "pt"
            else Template(self.tokenizer, name=encoding.template, sanitize_control_tokens=sanitize)
        )

    def encode(self, unparsed: Sequence[Row | Line]) -> Chunk:
        """Samples of these rows, in order. Raises: DataError with the row's file and line."""
        rows = list(map(parsed, unparsed))
        chunk = Chunk([], [], Counter())
        for row, encoded in zip(rows, self._tokens(rows, chunk.remarks), strict=True):
            kept = self._limited(encoded, row)
            if not kept:
                chunk.dropped["longer than max_length"] += 1
            elif not any(np.count_nonzero(sample.weights) for sample in kept):
                chunk.dropped["nothing to learn"] += 1
            else:
                chunk.remarks["longer than max_length, cut into pieces"] += len(kept) > 1
                chunk.samples.extend(kept)
                chunk.origins.extend([row.origin] * len(kept))
        return chunk

    def _tokens(self, rows: Sequence[Row], remarks: Counter[str]) -> list[Encoded]:
        settings = self.encoding
        conversations = [conversation_of(row, columns=settings.columns, system=settings.system) for row in rows]
        if self.template is None:
            return self._documents(rows, conversations, remarks)
        places = [str(row.origin) for row in rows]
        return self.template.encode(conversations, places=places, loss_scale=settings.loss_scale, remarks=remarks)

    def _documents(
        self, rows: Sequence[Row], conversations: Sequence[Conversation], remarks: Counter[str]
    ) -> list[Encoded]:
        for row, conversation in zip(rows, conversations, strict=True):
            for name, value in conversation.columns.items():
                try:
                    check_column(name, value, remarks)
                except DataError as e:
                    raise DataError(f"{row.origin}: {e}") from e
        documents = ["\n".join(m.content for m in conversation.messages) for conversation in conversations]
        return encode_documents(self.tokenizer, documents, control=self._control, remarks=remarks)

    def _limited(self, encoded: Encoded, row: Row) -> list[Encoded]:
        """The sample within max_length, its pieces, or nothing when it is to be dropped."""
        limit, strategy = self.encoding.max_length, self.encoding.truncation_strategy
        if limit is None or len(encoded.ids) <= limit:
            return [encoded]
        if strategy == "delete":
            return []
        if strategy == "raise":
            raise DataError(
                f"{row.origin}: has {len(encoded.ids)} tokens, above data.max_length={limit}; raise data.max_length, "
                f"or set data.truncation_strategy to delete, left or right (for pt, to split)"
            )
        if strategy == "split":
            return pieces(encoded, limit)
        return [_part(encoded, slice(-limit, None) if strategy == "left" else slice(limit))]


def pieces(encoded: Encoded, limit: int) -> list[Encoded]:
    """A sample cut into pieces of `limit` tokens; the last may be shorter.

    Nothing predicts the first token of a piece. So each piece begins with the last token of the one before, as context
    alone: every token but the sample's first is predicted once, whatever the limit.
    """
    return [_part(encoded, slice(start, start + limit)) for start in range(0, len(encoded.ids) - 1, limit - 1)]


def _part(encoded: Encoded, part: slice) -> Encoded:
    weights = encoded.weights[part].copy()
    weights[:1] = 0
    return Encoded(encoded.ids[part], weights)
