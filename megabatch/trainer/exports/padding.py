"""The token that fills batches of an exported model with a head, which must not be one that its texts end with.

transformers' `…ForSequenceClassification` reads the last token that is no padding. Where texts end with the padding's
token (as with tokenizers that have none, and take the end of a turn for it), it would read another place than ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from megabatch.config.run import RunConfig
from megabatch.data.rows.formats import Conversation, Message
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.data.tokens.templates import Template
from megabatch.errors import DataError
from megabatch.trainer.model_source import ModelSource


class Padding(NamedTuple):
    """A token of the tokenizer."""

    number: int
    text: str


def padding_of(run: RunConfig, source: ModelSource) -> Padding | None:
    """The tokenizer's padding, or the end of a text, if no text ends with it; else its token for what is unknown, the
    beginning of a text, or any special one that ends no text. None where there is no such token."""
    tokenizer = tokenizers.load(source.tokenizer)
    ends = {*_ends_of_turns(tokenizer, run.recipe.data.template), *tokenizer("a")["input_ids"][-1:]}
    number = next((one for one in _candidates(tokenizer) if one is not None and one not in ends), None)
    return None if number is None else Padding(number, tokenizer.convert_ids_to_tokens(number))


def _candidates(tokenizer: Any) -> Iterator[int | None]:
    yield from (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    added = tokenizer.added_tokens_decoder
    yield from (number for number in sorted(added) if added[number].special)


def _ends_of_turns(tokenizer: Any, template: str | None) -> list[int]:
    """The last tokens of conversations that end with either side; none where none can be rendered."""
    turns = [Message("user", "a"), Message("assistant", "a")]
    said = [Conversation(turns[:1]), Conversation(turns)]
    try:
        found = Template(tokenizer, name=template).whole(said, places=["a probe"] * 2, remarks=Counter())
    except DataError:
        return []
    return [int(one.ids[-1]) for one in found]
