"""Renders a chat template once and records which message produced each character.

Templates trim contents, add system messages and rewrite turns, so searching for a turn's content would not find it.
Instead we compile the template with marks: one where an iteration of a loop over the messages begins, one where such a
loop ends, and two around what `{% generation %}` marks. The marks are private characters that no message contains. We
remove them from the text again; the text between them shows where each message was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megabatch.errors import DataError

Span = tuple[int, int]
"""Characters [start, stop)."""

MARKS = ("\U0010f8f0", "\U0010f8f1", "\U0010f8f2", "\U0010f8f3")
"""Private characters to use as marks; we skip any that the messages contain."""


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    chunks: dict[int, Span]
    """Index of a message → span that the template's loops wrote for it; absent if they wrote only white space."""
    generated: list[Span]
    """What the template marks with `{% generation %}`, in order."""


class Renderer:
    """One chat template, compiled as transformers compiles it."""

    def __init__(self, source: str, constants: Mapping[str, str]) -> None:
        """`constants`: bos_token and the like. Raises: DataError for a template that is not valid Jinja."""
        from jinja2 import TemplateSyntaxError, meta, nodes
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.source, self.constants = source, dict(constants)
        try:
            environment = _compile_jinja_template(source).environment
            tree = environment.parse(source)
        except TemplateSyntaxError as e:
            raise DataError(f"the chat template is not valid Jinja (line {e.lineno}: {e.message}); fix it") from e
        known = {*environment.globals, *self.constants, "messages", "add_generation_prompt"}
        self.variables = frozenset(meta.find_undeclared_variables(tree) - known)
        """What the template reads besides the messages: `tools`, `documents`, `enable_thinking`, …"""
        self.names = frozenset(_names(tree))
        """Every name that the template looks up or compares with: fields of messages, roles, fields of tool calls."""
        self.marks_turns = any(_is_generation(node) for node in tree.find_all(nodes.CallBlock))
        self._template = environment.from_string(_Marking(environment).marked(tree))
        self._only_parts = False
        self._only_parts = self._reads_only_parts()

    def render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, mark: str = MARKS[0]
    ) -> Rendered:
        """Renders a conversation; no string in it may contain `mark`. Raises: DataError when the template fails."""
        if self._only_parts:
            messages = [_in_parts(message) for message in messages]
        index = {id(message): place for place, message in enumerate(messages)}

        def turn(value: Any) -> str:
            place = index.get(id(value))
            return "" if place is None else f"{mark}{place};"

        values = {"tools": None, "documents": None, "add_generation_prompt": False, **self.constants, **variables}
        try:
            text = self._template.render({**values, "messages": messages, _TURN: turn, _MARK: mark})
        except Exception as e:  # Jinja's errors and whatever an expression in the template raises
            raise DataError(f"it fails with {type(e).__name__}: {e}") from e
        return _read(text, mark)

    def _reads_only_parts(self) -> bool:
        """Whether contents must be lists of parts, as in some templates of vision models."""
        texts = []
        for content in ("probe", [{"type": "text", "text": "probe"}]):
            try:
                texts.append(self.render([{"role": "user", "content": content}], {}).text)
            except DataError:
                texts.append("")
        return "probe" not in texts[0] and "probe" in texts[1] and "'probe'" not in texts[1]


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _read(marked: str, mark: str) -> Rendered:
    """Removes the marks and returns what they delimit."""
    pieces: list[str] = []
    found: dict[int, list[int]] = {}
    generated: list[Span] = []
    opened: list[int] = []
    inside: list[int] = []  # the message of the loop iteration that is being written
    position = 0
    for number, part in enumerate(marked.split(mark)):
        piece = part
        if number:
            what, _, piece = part.partition(";")
            if what == _OPEN:
                opened.append(position)
            elif what == _CLOSE:
                generated.append((opened.pop(), position))
            elif what == _END:
                inside.clear()
            else:
                inside[:] = [int(what)]
        pieces.append(piece)
        if inside and piece and not piece.isspace():
            span = found.setdefault(inside[-1], [position, position])
            span[1] = position + len(piece)
        position += len(piece)
    return Rendered("".join(pieces), {i: (start, stop) for i, (start, stop) in found.items()}, generated)


_TURN, _MARK = "megabatch_turn", "megabatch_mark"
_END, _OPEN, _CLOSE = "e", "g", "h"
_NESTED = ("Macro", "CallBlock", "AssignBlock", "FilterBlock")
"""The output of these is first a value, which the template may test or trim: put no marks inside."""


class _Marking:
    """Puts marks into a template's tree."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment

    def marked(self, tree: Any) -> Any:
        self._body(tree, "body", in_loop=False)
        return tree

    def _body(self, node: Any, name: str, *, in_loop: bool) -> None:
        children: list[Any] = []
        for child in getattr(node, name):
            children.extend(self._child(child, in_loop=in_loop))
        setattr(node, name, children)

    def _child(self, node: Any, *, in_loop: bool) -> list[Any]:
        from jinja2 import nodes

        if _is_generation(node):
            self._body(node, "body", in_loop=in_loop)
            inner = nodes.Scope(node.body).set_lineno(node.lineno)
            return [self._write(_OPEN, node), inner, self._write(_CLOSE, node)]
        if type(node).__name__ in _NESTED:
            return [node]
        if not isinstance(node, nodes.For):
            for name in ("body", "elif_", "else_"):
                if isinstance(getattr(node, name, None), list):
                    self._body(node, name, in_loop=in_loop)
            return [node]
        target = node.target
        ours = isinstance(target, nodes.Name) and not node.recursive and not in_loop and _writes(node)
        self._body(node, "body", in_loop=in_loop or ours)
        if not ours or not isinstance(target, nodes.Name):
            return [node]
        call = nodes.Call(nodes.Name(_TURN, "load"), [nodes.Name(target.name, "load")], [], None, None)
        node.body.insert(0, self._placed(nodes.Output([call]), node))
        return [node, self._write(_END, node)]

    def _write(self, what: str, node: Any) -> Any:
        from jinja2 import nodes

        return self._placed(nodes.Output([nodes.Name(_MARK, "load"), nodes.TemplateData(f"{what};")]), node)

    def _placed(self, made: Any, node: Any) -> Any:
        return made.set_lineno(node.lineno, override=True).set_environment(self._environment)


def _writes(loop: Any) -> bool:
    """Whether a loop's body writes anything; those that only look ahead do not."""
    from jinja2 import nodes

    return any(True for _ in loop.find_all((nodes.Output, nodes.CallBlock)))


def _is_generation(node: Any) -> bool:
    call = getattr(node, "call", None)
    return (
        type(node).__name__ == "CallBlock"
        and getattr(getattr(call, "node", None), "name", None) == "_generation_support"
    )


def _names(tree: Any) -> set[str]:
    from jinja2 import nodes

    found = {node.attr for node in tree.find_all(nodes.Getattr)}
    found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return {name for name in found if _WORD.fullmatch(name)}


_WORD = re.compile(r"\w+")
