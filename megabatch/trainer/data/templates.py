"""Conversations → token ids and loss weights, through the tokenizer's own chat template.

`weights[i]` is the loss weight of predicting `ids[i]`; nothing predicts the first token, so `weights[0]` is 0.
The loss covers what the assistant says and its end-of-turn token, not the newline that some templates put after it.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from megabatch.errors import DataError
from megabatch.trainer.data.formats import Message
from megabatch.trainer.data.spans import Span, assistant_spans, generation_prompt
from megabatch.trainer.data.tokenizer import CHATML

log = logging.getLogger(__name__)

LossScale = Literal["default", "last_round", "all"]
"""Which tokens are learned: all assistant turns, those after the last user message, or every token."""

PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""For base models without chat tokens: `User: …\\nAssistant: …<eos>\\n`."""

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


class Encoded(NamedTuple):
    """One tokenised sample."""

    ids: np.ndarray
    """int32 [n]"""
    weights: np.ndarray
    """float32 [n]"""


class Template:
    """A chat template together with its tokenizer."""

    def __init__(self, tokenizer: Any, *, name: str | None = None) -> None:
        """`name`: None for the tokenizer's own (see `_default`), `chatml` or `plain`. Raises: DataError."""
        self.tokenizer = tokenizer
        self.name, self.source = _source(tokenizer, name)
        self._marks_turns = bool(_GENERATION.search(self.source))
        special = sorted({*map(str, tokenizer.all_special_tokens), *_added_special(tokenizer)}, key=len, reverse=True)
        ends = [" *(?:" + "|".join(map(re.escape, special)) + ")"] if special else []
        if tokenizer.eos_token:
            ends.append(r"\s*" + re.escape(tokenizer.eos_token))
        self._end_of_turn = re.compile("|".join(ends)) if ends else None
        self._prompt = self._generation_prompt()
        self._warned = False

    def encode(
        self, conversations: Sequence[Sequence[Message]], *, places: Sequence[str], loss_scale: LossScale
    ) -> list[Encoded]:
        """Tokenises conversations; `places` name them in errors. Raises: DataError for one that cannot be aligned."""
        located = [self._locate(c, place=p) for c, p in zip(conversations, places, strict=True)]
        batch = self.tokenizer(
            [text for text, _ in located], add_special_tokens=False, return_offsets_mapping=True, **_BARE
        )
        encoded = []
        for index, (messages, (_, spans)) in enumerate(zip(conversations, located, strict=True)):
            ids = np.asarray(batch["input_ids"][index], np.int32)
            if loss_scale == "all":
                weights: np.ndarray = np.ones(len(ids), np.float32)
            else:
                learned = [s for s, keep in zip(spans, learned_turns(messages, loss_scale), strict=True) if keep]
                weights = _weights(np.asarray(batch["offset_mapping"][index]).reshape(-1, 2), learned)
            weights[:1] = 0
            encoded.append(Encoded(ids, weights))
        return encoded

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises: DataError when the template refuses it."""
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as e:  # Jinja's errors and whatever an expression in the template raises
            raise DataError(f"it fails with {type(e).__name__}: {e}") from e
        return str(text)

    def _locate(self, messages: Sequence[Message], *, place: str) -> tuple[str, list[Span]]:
        """Text and, for each assistant message, the span of what it says with its end of turn."""
        try:
            if self._marks_turns:
                text, spans = self._marked(messages)
            else:
                text, spans = assistant_spans(self.render, messages, prompt=self._prompt)
        except DataError as e:
            raise DataError(
                f"{place}: chat template {self.name} cannot be used on it: {e}; check the row, or set "
                f"data.template to chatml or plain"
            ) from e
        return text, [self._with_end(text, span) for span in spans]

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Text and spans of a template that marks the assistant's turns with `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self.render(messages)
        _, spans = render_jinja_template(
            conversations=[[{"role": m.role, "content": m.content} for m in messages]],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        turns = sum(m.role == "assistant" for m in messages)
        if len(spans[0]) != turns:
            raise DataError(f"it marks {len(spans[0])} spans with generation for {turns} assistant messages")
        return text, [(start, stop) for start, stop in spans[0]]

    def _with_end(self, text: str, span: Span) -> Span:
        """The span with the end-of-turn token, and without white space after that token."""
        start, stop = span
        if self._end_of_turn is None:
            return span
        said = text[start:stop].rstrip()
        if self._marks_turns and any(end.end() == len(said) for end in self._end_of_turn.finditer(said)):
            return start, start + len(said)  # a template that marks the turn's end as well
        if match := self._end_of_turn.match(text, stop):
            return start, match.end()
        if not self._warned:
            self._warned = True
            log.warning("chat template %s puts no end-of-turn token after the assistant: it is not learned", self.name)
        return span

    def _generation_prompt(self) -> str:
        try:
            return generation_prompt(self.render)
        except DataError:
            return ""  # a template that refuses the probe; spans then start where the template's own text ends


def learned_turns(messages: Sequence[Message], loss_scale: LossScale) -> list[bool]:
    """For each assistant message whether its tokens carry loss; a message's own `loss` wins."""
    last_user = max((index for index, m in enumerate(messages) if m.role == "user"), default=-1)
    return [
        m.loss if m.loss is not None else loss_scale != "last_round" or index > last_user
        for index, m in enumerate(messages)
        if m.role == "assistant"
    ]


def encode_documents(tokenizer: Any, documents: Sequence[str]) -> list[Encoded]:
    """Pretraining samples: the text with the tokenizer's own special tokens, then EOS; every token is learned."""
    eos = tokenizer.eos_token_id
    encoded = []
    for tokens in tokenizer(list(documents), **_BARE)["input_ids"]:
        ids = np.asarray(tokens if tokens[-1:] == [eos] else [*tokens, eos], np.int32)
        weights: np.ndarray = np.ones(len(ids), np.float32)
        weights[:1] = 0
        encoded.append(Encoded(ids, weights))
    return encoded


# A tokenizer's warning about texts beyond its model_max_length is not ours to give: max_length is checked later.
_BARE = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


def _weights(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """1 for the tokens that share a character with a span (or stand empty inside one), else 0: float32 [n]."""
    weights: np.ndarray = np.zeros(len(offsets), np.float32)
    first, stop = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    for start, end in spans:
        weights[(first < end) & (stop > start)] = 1
    return weights


def _added_special(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _source(tokenizer: Any, name: str | None) -> tuple[str, str]:
    """Name and Jinja text of the template asked for, or of the default one."""
    if name is None:
        name, source = _default(tokenizer)
    elif name in ("chatml", "plain"):
        source = CHATML if name == "chatml" else PLAIN
    else:
        close = difflib.get_close_matches(name, ["chatml", "plain"], n=1)
        raise DataError(
            f"data.template={name!r} is unknown; try {close[0] if close else 'chatml or plain'}, "
            f"or leave it unset for the tokenizer's own chat template"
        )
    if name == "plain" and not tokenizer.eos_token:
        raise DataError("data.template='plain' ends turns with the tokenizer's eos_token, which is not set; set it")
    if name == "chatml" and not _has_chatml(tokenizer):
        raise DataError("data.template='chatml' needs <|im_start|> and <|im_end|> in the vocabulary; try plain")
    return name, source


def _default(tokenizer: Any) -> tuple[str, str]:
    """The tokenizer's own template, else ChatML if the vocabulary has its tokens, else the plain one."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return "of the tokenizer", own
    return ("chatml", CHATML) if _has_chatml(tokenizer) else ("plain", PLAIN)


def _has_chatml(tokenizer: Any) -> bool:
    return {"<|im_start|>", "<|im_end|>"} <= _added_special(tokenizer)
