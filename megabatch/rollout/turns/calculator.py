"""A shipped environment: a calculator that the model may call as a tool before it answers."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_OPERATORS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
LONGEST = 200
"""Characters of an expression."""
LARGEST = 1e15
"""Of every number on the way."""


class Calculator:
    """Answers calls of the form that Hermes and Qwen models are trained on, several in a turn if there are:

        <tool_call>{"name": "calculator", "arguments": {"expression": "12 * (3 + 4)"}}</tool_call>

    A turn without a call ends the conversation. Faulty calls are answered with what is wrong.
    """

    def step(self, completion: str) -> tuple[list[dict[str, str]] | None, float | None, bool]:
        calls = _CALL.findall(completion)
        if not calls:
            return None, None, True
        return [{"role": "tool", "content": _answer(call)} for call in calls], None, False


def _answer(call: str) -> str:
    try:
        asked = json.loads(call)
        if asked["name"] != "calculator":
            return f"error: there is no tool {asked['name']}, only calculator"
        return calculate(str(asked["arguments"]["expression"]))
    except (ValueError, KeyError, TypeError):
        return 'error: a call looks like {"name": "calculator", "arguments": {"expression": "1 + 2"}}'


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and parentheses; else `error: …`.

    Nothing else of Python is evaluated, and numbers stay small enough that nothing takes long.
    """
    if len(expression) > LONGEST:
        return f"error: an expression has at most {LONGEST} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError) as error:
        return f"error: {error.msg if isinstance(error, SyntaxError) else error}"
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def _value(node: Any) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError("exponents are at most 64")
        return _small(_OPERATORS[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % ** and parentheses")


def _small(value: Any) -> float:
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError(f"numbers are real and at most {LARGEST:g}")
    return float(value) if isinstance(value, float) else value
