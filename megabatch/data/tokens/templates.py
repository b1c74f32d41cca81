"""Conversations → token ids and loss weights, through the tokenizer's own chat template.

The ids are those of transformers' `apply_chat_template`, except for control tokens in the data (see `control_tokens`).
`weights[i]` is the loss weight of predicting `ids[i]`; nothing predicts the first token, so `weights[0]` is 0.
The loss covers what the assistant says and its end-of-turn token, not the newline that some templates put after it.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from megabatch.data.rows.formats import Conversation, is_text
from megabatch.data.rows.turns import Message
from megabatch.data.tokens.aligning import Aligner, Text
from megabatch.data.tokens.assistant_spans import answer
from megabatch.data.tokens.control_tokens import ESCAPED, ControlTokens, Spelling
from megabatch.data.tokens.default_templates import OWN_TEMPLATES, with_bos
from megabatch.data.tokens.fitting import Fitting
from megabatch.data.tokens.locating import Locator, Part
from megabatch.data.tokens.new_tokens import of_the_data
from megabatch.data.tokens.rendering import MARKS, Rendered, Renderer
from megabatch.data.tokens.sample import Encoded
from megabatch.data.tokens.tokenizer import backend
from megabatch.data.tokens.turn_ends import TurnEnds
from megabatch.errors import DataError
from megabatch.loss_scales import LossScale, parse

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_LEFT_OUT = "the template omits the text beside a call"


class _Said(NamedTuple):
    """The text of a conversation to encode, and whether the twin tokenizer encodes it."""

    text: Text
    by_twin: bool


class _Form(NamedTuple):
    """One chat template and what renders, fills and reads it."""

    renderer: Renderer
    fitting: Fitting
    locator: Locator


class Template:
    """A chat template together with its tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        new_special_tokens: Collection[str] = (),
    ) -> None:
        """`name`: None for the tokenizer's own (see `_sources`), `chatml` or `plain`; `variables`: for
        the template, where a row has none of that name; `new_special_tokens`: tokens of
        the run's own, which are text to the template unless it writes them itself. Raises: DataError."""
        self.tokenizer = tokenizer
        self.name, self.sources = _sources(tokenizer, name)
        text = of_the_data(new_special_tokens, self.sources.values())
        self._variables = dict(variables or {})
        self._ends = TurnEnds(_special(tokenizer) - text, eos=tokenizer.eos_token)
        advice = _advice(tokenizer, self.name)
        self._forms = {
            kind: _form(tokenizer, source, self._ends, advice, self._variables)
            for kind, source in self.sources.items()
        }
        self._refuse_unread()
        extra = {token for form in self._forms.values() for token in _turn_tokens(tokenizer, form)}
        self._control = ControlTokens(tokenizer, extra, of_the_data=text) if sanitize_control_tokens else None
        self._aligner = Aligner(backend(tokenizer))
        self._warned = False

    def _refuse_unread(self) -> None:
        """Raises: DataError for a variable that the template does not read."""
        read = set[str]().union(*(form.renderer.variables for form in self._forms.values()))
        for name in self._variables:
            if name not in read:
                close = difflib.get_close_matches(name, read - {"tools", "documents"}, n=1)
                raise DataError(
                    f"the run gives chat templates {name}, which chat template {self.name} does not read"
                    + (f"; try {close[0]}" if close else "; leave it out")
                )

    @property
    def is_own(self) -> bool:
        """Whether the template is the tokenizer's own, so that a copy of the tokenizer's files includes it."""
        return self.name == "of the tokenizer"

    def turn_end(self) -> str | None:
        """The special token that ends the assistant's turn; None if the template writes none."""
        form = self._forms["default"]
        try:
            text = form.renderer.render(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], {}
            ).text
        except DataError:
            return None
        return self._ends.last(text.rstrip())

    def up_to_the_answer(self, conversation: Conversation) -> str:
        """The text of a conversation that goes on with the assistant's turn, its control tokens as they stand, in the
        form and with the variables of `encode_prompts`. Raises: DataError."""
        form = self._form_for(conversation)
        variables, candidates = self._asking(form, conversation)
        return _first_that_renders(candidates, lambda fitted: form.renderer.render(fitted, variables).text)

    @property
    def control_tokens(self) -> Sequence[str]:
        """Tokens that texts of others must not contain; none where they may act."""
        return () if self._control is None else self._control.tokens

    def encode(
        self,
        conversations: Sequence[Conversation],
        *,
        places: Sequence[str],
        loss_scale: str,
        remarks: Counter[str] | None = None,
    ) -> list[Encoded]:
        """Tokenises conversations.

        Args: `places` name them in errors; `loss_scale`: see `loss_scales`; `remarks` counts, for example, columns
        that nothing reads.

        Raises: DataError for a conversation that cannot be rendered, aligned, or told apart from the template.
        """
        counted: Counter[str] = Counter() if remarks is None else remarks
        scale = parse(loss_scale)
        texts = [
            self._text(conversation, place=place, loss_scale=scale, remarks=counted)
            for conversation, place in zip(conversations, places, strict=True)
        ]
        return self._encoded(texts, whole=scale.base == "all")

    def whole(
        self, conversations: Sequence[Conversation], *, places: Sequence[str], remarks: Counter[str]
    ) -> list[Encoded]:
        """Tokenises conversations that need no answer, all of whose tokens count alike. Args and errors as above."""
        everything = parse("all")
        texts = [
            self._text(conversation, place=place, loss_scale=everything, remarks=remarks, learned=False)
            for conversation, place in zip(conversations, places, strict=True)
        ]
        return self._encoded(texts, whole=True)

    def _encoded(self, texts: Sequence[_Said], *, whole: bool) -> list[Encoded]:
        encoded: dict[int, Encoded] = {}
        for by_twin in (False, True):
            chosen = [index for index, text in enumerate(texts) if text.by_twin == by_twin]
            if chosen:
                aligner = self._twins_aligner if by_twin else self._aligner
                made = aligner.encode([texts[index].text for index in chosen], whole=whole)
                encoded |= zip(chosen, made, strict=True)
        return [encoded[index] for index in range(len(texts))]

    def encode_prompts(self, conversations: Sequence[Conversation], *, places: Sequence[str]) -> list[Encoded]:
        """Tokenises conversations up to where the assistant's next turn begins. Args and errors: as of `encode`."""
        texts = [
            self._said_of(conversation, place, self._asked)
            for conversation, place in zip(conversations, places, strict=True)
        ]
        found = []
        for said in texts:
            aligner = self._twins_aligner if said.by_twin else self._aligner
            found += aligner.encode([said.text], whole=True)
        return found

    def _asked(self, conversation: Conversation) -> _Said:
        """The conversation's text with the template's generation prompt."""
        form = self._form_for(conversation)
        variables, candidates = self._asking(form, conversation)

        def rendered(fitted: Sequence[Mapping[str, Any]]) -> _Said:
            said = _json([fitted, variables])
            mark, inner = _marks(said)
            messages, marked, control = self._sanitised(fitted, variables, said, inner)
            text = form.renderer.render(messages, marked, mark=mark).text
            if control is None:
                return _Said(Text(text, []), by_twin=False)
            return _Said(Text(control.spelled(text, inner).text, []), by_twin=True)

        return _first_that_renders(candidates, rendered)

    def _asking(
        self, form: _Form, conversation: Conversation
    ) -> tuple[Mapping[str, Any], Iterator[list[dict[str, Any]]]]:
        """The template's variables for a conversation that the assistant goes on with, and forms of its turns."""
        remarks: Counter[str] = Counter()
        variables = {**form.fitting.variables(conversation, remarks), "add_generation_prompt": True}
        return variables, (fitted for _, fitted in form.fitting.candidates(conversation, remarks))

    @cached_property
    def _twins_aligner(self) -> Aligner:
        assert self._control is not None
        return Aligner(self._control.twin)

    def _text(
        self,
        conversation: Conversation,
        *,
        place: str,
        loss_scale: LossScale,
        remarks: Counter[str],
        learned: bool = True,
    ) -> _Said:
        return self._said_of(
            conversation,
            place,
            lambda one: self._located(one, loss_scale=loss_scale, remarks=remarks, learned=learned),
        )

    def _said_of(self, conversation: Conversation, place: str, text_of: Callable[[Conversation], _Said]) -> _Said:
        """Raises: DataError with the place and what may help."""
        try:
            return text_of(conversation)
        except DataError as e:
            others = " or ".join(
                name for name in OWN_TEMPLATES if name != self.name and _lack(self.tokenizer, name) is None
            )
            raise DataError(
                f"{place}: chat template {self.name} cannot be used on it: {e}"
                + (f"; check the row, or set data.template to {others}" if others and "data." not in str(e) else "")
            ) from e

    def _located(
        self, conversation: Conversation, *, loss_scale: LossScale, remarks: Counter[str], learned: bool
    ) -> _Said:
        """The conversation's text and the loss weights of its characters."""
        form = self._form_for(conversation)
        variables = form.fitting.variables(conversation, remarks)
        failed: DataError | None = None
        for messages, fitted in form.fitting.candidates(conversation, remarks):
            try:
                text = self._rendered(
                    form, messages, fitted, variables, loss_scale=loss_scale, remarks=remarks, learned=learned
                )
            except DataError as e:
                failed = failed or e
                continue
            return text
        assert failed is not None
        raise failed

    def _form_for(self, conversation: Conversation) -> _Form:
        has_tools = conversation.columns.get("tools") is not None
        return self._forms["tool_use" if has_tools and "tool_use" in self._forms else "default"]

    def _sanitised(
        self, fitted: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], said: str, inner: str
    ) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any], ControlTokens | None]:
        """Turns and variables with control tokens marked, and what spells them; None where there are none."""
        control = self._control if self._control is not None and self._control.may_be_in(said) else None
        if control is None:
            return fitted, variables, None
        plain = fitted, variables
        fitted = [control.mark(m, inner, by_assistant=m["role"] == "assistant") for m in fitted]
        variables = control.mark(variables, inner)
        return fitted, variables, control if (fitted, variables) != plain else None

    def _rendered(
        self,
        form: _Form,
        messages: Sequence[Message],
        fitted: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        loss_scale: LossScale,
        remarks: Counter[str],
        learned: bool,
    ) -> _Said:
        """Args: learned: some of the turns have weights; False gives every token the same."""
        said = _json([fitted, variables])
        mark, inner = _marks(said)
        fitted, variables, control = self._sanitised(fitted, variables, said, inner)
        rendered = form.renderer.render(fitted, variables, mark=mark)
        remarks[_LEFT_OUT] += any(m.get("tool_calls") and answer(m) not in rendered.text for m in fitted)
        weighed: list[tuple[int, int, float]] = []
        if learned:
            parts = form.locator.parts(fitted, variables, rendered)
            self._warn_of_missing_end(rendered, parts)
            turns = _turns(messages, loss_scale)
            weighed = self._weighed(rendered.text, parts, turns)
        if control is None:
            return _Said(Text(rendered.text, weighed), by_twin=False)
        remarks[ESCAPED] += control.are_in(said)
        spelling: Spelling = control.spelled(rendered.text, inner)
        placed = [(spelling.at(start), spelling.at(stop), weight) for start, stop, weight in weighed]
        return _Said(Text(spelling.text, placed), by_twin=True)

    def _weighed(self, text: str, parts: Sequence[Part], turns: Sequence[_Turn]) -> list[tuple[int, int, float]]:
        """Character ranges with weights: the turn's weight times the scales'; for the end-of-turn token unscaled."""
        weighed: list[tuple[int, int, float]] = []
        for part in parts:
            weight, question, scale = turns[part.turn]
            said = part.start + self._ends.without(text[part.start : part.stop]) if scale.scales else part.start
            segments = scale.segments(text[part.start : said], question)
            weighed += [(part.start + start, part.start + stop, weight * factor) for start, stop, factor in segments]
            weighed.append((said, part.stop, weight))
        return weighed

    def _warn_of_missing_end(self, rendered: Rendered, parts: Sequence[Part]) -> None:
        if not self._warned and not self._ends.at_end(rendered.text[parts[-1].start : parts[-1].stop]):
            self._warned = True
            log.warning(
                "chat template %s writes no end-of-turn token after the assistant: the model will not learn "
                "to end its turn",
                self.name,
            )


def _first_that_renders(
    candidates: Iterable[list[dict[str, Any]]], render: Callable[[Sequence[Mapping[str, Any]]], _Made]
) -> _Made:
    """What the first of these forms becomes. Raises: DataError of the first where none can be rendered."""
    failed: DataError | None = None
    for fitted in candidates:
        try:
            return render(fitted)
        except DataError as e:
            failed = failed or e
    assert failed is not None, "the turns themselves are the first form"
    raise failed


def learned_turns(messages: Sequence[Message], base: str) -> list[float]:
    """For each assistant message, the loss weight of its tokens; a message's own `loss` takes precedence."""
    last_user = max((index for index, m in enumerate(messages) if m.role == "user"), default=-1)
    return [
        (1.0 if m.scale is None else m.scale)
        * (m.loss if m.loss is not None else float(base != "last_round" or index > last_user))
        for index, m in enumerate(messages)
        if m.role == "assistant"
    ]


class _Turn(NamedTuple):
    """How an assistant's message is weighed."""

    weight: float
    question: str
    """The message that it answers."""
    scale: LossScale
    """For the parts of its words."""


def _turns(messages: Sequence[Message], loss_scale: LossScale) -> list[_Turn]:
    """Of each assistant message; its own `loss_scale` takes the place of the run's scales, as in ms-swift."""
    own = LossScale(loss_scale.base)
    scales = [loss_scale if m.scale is None else own for m in messages if m.role == "assistant"]
    found = zip(learned_turns(messages, loss_scale.base), questions(messages), scales, strict=True)
    return [_Turn(*turn) for turn in found]


def questions(messages: Sequence[Message]) -> list[str]:
    """For each assistant message, the text of the user's or tool's message before it."""
    found, last = [], ""
    for message in messages:
        if message.role == "assistant":
            found.append(last)
        elif message.role != "system":
            last = message.content
    return found


def _json(value: Any) -> str:
    """The conversation as one string to search in. Raises: DataError for a value that is not JSON or not text."""
    try:
        made = _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise DataError(f"it holds a value that JSON cannot represent ({e}); drop or convert that field") from e
    if not is_text(made):
        raise DataError("it holds half a surrogate pair, which is not valid text; delete it")
    return made


def _marks(said: str) -> tuple[str, str]:
    """Two private characters that a conversation does not contain."""
    free = [mark for mark in MARKS if mark not in said]
    if len(free) < 2:
        raise DataError(f"it holds the private characters U+{ord(MARKS[0]):X} and following; delete them")
    return free[0], free[1]


def _form(tokenizer: Any, source: str, ends: TurnEnds, advice: str, variables: Mapping[str, Any]) -> _Form:
    renderer = Renderer(source, tokenizer.special_tokens_map)
    return _Form(renderer, Fitting(renderer, advice=advice, variables=variables), Locator(renderer, ends))


def _turn_tokens(tokenizer: Any, form: _Form) -> set[str]:
    """Added tokens between turns that the tokenizer does not declare special."""
    try:
        between = form.renderer.render([{"role": "user", "content": "x"}], {}).text + form.locator.prompt
    except DataError:
        return set()
    return {token for token in tokenizer.get_added_vocab() if token in between and token.strip()}


def _special(tokenizer: Any) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(map(str, tokenizer.all_special_tokens))


def _sources(tokenizer: Any, name: str | None) -> tuple[str, dict[str, str]]:
    """Name and Jinja sources of the requested or default template; the source `tool_use` is for rows with tools."""
    if name is None:
        return _default(tokenizer)
    if name not in OWN_TEMPLATES:
        close = difflib.get_close_matches(name, OWN_TEMPLATES, n=1)
        raise DataError(
            f"data.template={name!r} is unknown; try {close[0] if close else ' or '.join(OWN_TEMPLATES)}, "
            f"or leave it unset for the tokenizer's own chat template"
        )
    if lack := _lack(tokenizer, name):
        raise DataError(f"data.template={name!r} {lack}")
    return name, {"default": _own(tokenizer, name)}


def _default(tokenizer: Any) -> tuple[str, dict[str, str]]:
    """The tokenizer's own template, else ChatML if the vocabulary has its tokens, else the plain one."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = {kind: source for kind, source in own.items() if kind in ("default", "tool_use")}
    elif own:
        own = {"default": own}
    if own and "default" in own:
        return "of the tokenizer", own
    name = "chatml" if _lack(tokenizer, "chatml") is None else "plain"
    if lack := _lack(tokenizer, name):
        raise DataError(f"data.template='plain' {lack}")
    return name, {"default": _own(tokenizer, name)}


def _own(tokenizer: Any, name: str) -> str:
    source = OWN_TEMPLATES[name]
    return with_bos(source) if _adds_bos(tokenizer) else source


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its BOS."""
    bos = tokenizer.bos_token_id
    return (
        bos is not None
        and tokenizer("x")["input_ids"][:1] == [bos] != tokenizer("x", add_special_tokens=False)["input_ids"][:1]
    )


def _lack(tokenizer: Any, name: str) -> str | None:
    """Why a template of our own cannot be used with a tokenizer."""
    if name == "plain":
        return None if tokenizer.eos_token else "ends turns with the tokenizer's eos_token, which is not set; set it"
    has = {"<|im_start|>", "<|im_end|>"} <= _special(tokenizer)
    return None if has else "needs <|im_start|> and <|im_end|> in the vocabulary; try plain"


def _advice(tokenizer: Any, name: str) -> str:
    usable = [own for own in OWN_TEMPLATES if _lack(tokenizer, own) is None and own != name]
    other = f"set data.template to {' or '.join(usable)}, which reads them, or " if usable else ""
    return f'{other}drop the field (data.columns={{"tools": "_"}} leaves a column out)'
