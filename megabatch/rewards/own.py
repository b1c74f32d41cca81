"""Rewards that are a user's own functions: called with the arguments of ms-swift's and TRL's reward functions.

A function, or a class with `__call__`, gets one list for each of its arguments, of one value for each completion:

    def brevity(completions, **columns): ...                        # ms-swift: completions are texts
    def brevity(prompts, completions, completion_ids, **columns):   # TRL: prompts and completions are messages

It gets messages if it takes `prompts`, or if its annotation of `completions` mentions `dict`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import islice
from typing import Any, ClassVar, Protocol

from megabatch.errors import ConfigError, RewardError
from megabatch.rewards.sample import Place, RewardSample, Score
from megabatch.user_code import load_named, split
from megabatch.user_error import describe_error
from megabatch.values import dataclass

EXAMPLE = "my_rewards.py:brevity"
LARGEST = 3.4e38
"""Of a reward, whose advantage is a number of fp32."""


@dataclass(frozen=True, slots=True)
class Own:
    """A function `file.py:name`, sync or async."""

    text: str
    place: ClassVar[Place] = "shared"

    @property
    def name(self) -> str:
        return split(self.text, kind="function", example=EXAMPLE)[1]

    def open(self) -> Score:
        """Raises: ConfigError with the line, if the function cannot be loaded or called with such arguments."""
        return load_function(self.text)


class Function(Protocol):
    """A user's function, ready to be called; Raises: RewardError for a result that is no rewards."""

    def __call__(self, samples: Sequence[RewardSample], **more: Sequence[Any]) -> list[float | None]: ...


_Parameters = Mapping[str, inspect.Parameter]


def load_function(text: str, *, needed: str = "completions") -> Function:
    """What `file.py:name` names. Args: `needed`: an argument that it must take.

    Raises: ConfigError where it cannot be a reward.
    """
    name, function, parameters = _loaded(text, needed)
    loop = asyncio.Runner()  # one for all calls: clients that a function keeps belong to the loop they were made in

    def call(samples: Sequence[RewardSample], **more: Sequence[Any]) -> list[float | None]:
        result = function(**_taken(name, parameters, samples, more))
        return _checked(name, samples, loop.run(_awaited(result)) if inspect.isawaitable(result) else result)

    return call


def columns_needed(text: str, *, needed: str = "completions") -> list[str]:
    """The columns of rows without which a function cannot be called. Args and Raises: as of `load_function`."""
    ours = {needed, *_arguments((), as_messages=False)}
    return [name for name in _without_default(_loaded(text, needed)[2]) if name not in ours]


def _loaded(text: str, needed: str) -> tuple[str, Callable[..., Any], _Parameters]:
    """Its name, what is called, and its parameters."""
    function, file = load_named(text, kind="function", example=EXAMPLE)
    name = split(text)[1]
    if isinstance(function, type):
        try:
            function = function()
        except Exception as error:
            raise ConfigError(f"{name}() cannot be made: {describe_error(error, file)}") from error
        if not callable(function):
            raise ConfigError(f"{name} has no method __call__(completions, **columns)")
    parameters = inspect.signature(function).parameters
    if needed not in parameters and not _takes_all(parameters):
        raise ConfigError(f"{name} must take the argument {needed}, such as {name}({needed}, **columns)")
    if by_position := [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]:
        raise ConfigError(f"{name} must take {', '.join(by_position)} by keyword")
    return name, function, parameters


def _without_default(parameters: _Parameters) -> list[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [one.name for one in parameters.values() if one.default is one.empty and one.kind not in variadic]


def _takes_all(parameters: _Parameters) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _taken(
    name: str, parameters: _Parameters, samples: Sequence[RewardSample], more: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """The arguments that a function takes. Raises: RewardError where it needs one that no row has."""
    given = _arguments(samples, as_messages=_wants_messages(parameters)) | {k: list(v) for k, v in more.items()}
    if missing := [parameter for parameter in _without_default(parameters) if parameter not in given]:
        raise RewardError(
            f"{name} takes {missing[0]}, and the rows have no such column; sample {samples[0].key} has "
            f"{', '.join(sorted(samples[0].columns)) or 'no other columns'}"
        )
    return given if _takes_all(parameters) else {key: value for key, value in given.items() if key in parameters}


async def _awaited(result: Any) -> Any:
    return await result


def _wants_messages(parameters: _Parameters) -> bool:
    completions = parameters.get("completions")
    annotation = "" if completions is None or completions.annotation is completions.empty else completions.annotation
    return "prompts" in parameters or "dict" in str(annotation).lower()


def _arguments(samples: Sequence[RewardSample], *, as_messages: bool) -> dict[str, list[Any]]:
    """Everything that a function may take; our own names are stronger than columns of the same name."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    answers = [[{"role": "assistant", "content": sample.completion}] for sample in samples]
    prompts = [[dict(message) for message in sample.prompt] for sample in samples]
    return {name: [sample.columns.get(name) for sample in samples] for name in names} | {
        "prompts": prompts,
        "completions": answers if as_messages else [sample.completion for sample in samples],
        "completion_ids": [list(sample.ids) for sample in samples],
        "response_token_ids": [list(sample.ids) for sample in samples],
        "messages": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        "truncated": [sample.truncated for sample in samples],
    }


def _checked(name: str, samples: Sequence[RewardSample], values: Any) -> list[float | None]:
    """Raises: RewardError for anything but one number or None for each sample, in their order."""
    try:
        # lists of keys, of a set in any order, or of characters would be numbers of something else
        has_order = not isinstance(values, str | bytes | bytearray | Mapping | Set)
        found = list(islice(values, len(samples) + 1)) if has_order else None
    except TypeError:
        found = None
    if found is None:
        raise RewardError(f"{name} returned {values!r:.80}; must be a list, one number for each completion")
    if len(found) != len(samples):
        more = "more than " if len(found) > len(samples) else ""
        count = len(samples) if more else len(found)
        raise RewardError(
            f"{name} returned {more}{count} values for the {len(samples)} completions from sample {samples[0].key} "
            "on; must be one for each, None where there is no reward"
        )
    return [_number(name, sample, value) for sample, value in zip(samples, found, strict=True)]


def _number(name: str, sample: RewardSample, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str) else math.inf
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if abs(number) > LARGEST:
        raise RewardError(f"{name} returned {value!r:.80} for sample {sample.key}; must be a finite number or None")
    return number
