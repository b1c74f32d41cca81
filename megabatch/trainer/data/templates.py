"""Conversations → token ids and loss weights, through the tokenizer's own chat template.

`weights[i]` is the loss weight of predicting `ids[i]`; nothing predicts the first token, so `weights[0]` is 0.
The loss covers what the assistant says and its end-of-turn token, not the newline that some templates put after it.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from megabatch.errors import DataError
from megabatch.trainer.data.formats import Message
from megabatch.trainer.data.spans import Span, assistant_spans, generation_prompt
from megabatch.trainer.data.tokenizer import CHATML
from megabatch.trainer.data.turn_ends import TurnEnds

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
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


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
        self._ends = TurnEnds(_special(tokenizer), eos=tokenizer.eos_token)
        self._prompts = self._generation_prompts()
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
                wanted = learned_turns(messages, loss_scale)
                learned = [span for turn, span in spans if wanted[turn]]
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

    def _locate(self, messages: Sequence[Message], *, place: str) -> tuple[str, list[tuple[int, Span]]]:
        """Text, and spans to be learned with the number of the assistant message that each belongs to."""
        try:
            if self._marks_turns:
                text, spans = self._marked(messages)
            else:
                text, said = self._aligned(messages)
                spans = list(enumerate(self._ends.extend(text, said)))
        except DataError as e:
            raise DataError(
                f"{place}: chat template {self.name} cannot be used on it: {e}; check the row, or set "
                f"data.template to chatml or plain"
            ) from e
        if not self._warned and not self._ends.at_end(text[slice(*spans[-1][1])]):
            self._warned = True
            log.warning("chat template %s puts no end-of-turn token after the assistant: it is not learned", self.name)
        return text, spans

    def _aligned(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Text, and what each assistant message says in it, found with the first generation prompt that fits."""
        for prompt in self._prompts[:-1]:
            with contextlib.suppress(DataError):
                return assistant_spans(self.render, messages, prompt=prompt)
        return assistant_spans(self.render, messages, prompt=self._prompts[-1])

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, Span]]]:
        """Like `_locate`, for a template that itself marks with `{% generation %}` what is to be learned."""
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self.render(messages)  # first: it reports a refusal clearly
        _, marks = render_jinja_template(
            conversations=[[{"role": m.role, "content": m.content} for m in messages]],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        spans = [self._ends.trim(text, (start, stop)) for start, stop in marks[0] if start < stop]
        if not spans:
            raise DataError("it marks nothing with generation")
        turns = sum(m.role == "assistant" for m in messages)
        if len(spans) == turns:
            return text, list(enumerate(self._ends.complete(text, span) for span in spans))
        # Several marks for a turn (its header, its text, its end) belong to the first turn that stops behind them.
        stops = [stop for _, stop in self._aligned(messages)[1]]
        return text, [(min(bisect_left(stops, start), turns - 1), (start, stop)) for start, stop in spans]

    def _generation_prompts(self) -> list[str]:
        """What may stand before the assistant's own text, to be tried in this order.

        The template's generation prompt; the same without a thinking block that it opens or fills, for turns that
        bring their own thoughts.
        """
        try:
            prompt = generation_prompt(self.render)
        except DataError:
            return [""]  # a template that refuses the probe; spans then start where the template's own text ends
        return list(dict.fromkeys([prompt, _THINKING.sub("", prompt)]))


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


def _special(tokenizer: Any) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(map(str, tokenizer.all_special_tokens))


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
    return {"<|im_start|>", "<|im_end|>"} <= _special(tokenizer)
