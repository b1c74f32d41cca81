"""Callbacks: classes of a user's own file that the trainer tells of steps, evaluations and checkpoints.

The launcher loads them to refuse a broken one before the job is queued; the trainer loads them to call them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from megabatch.errors import ConfigError
from megabatch.user_code import load_named, near
from megabatch.user_error import describe_error

HOOKS: Mapping[str, Mapping[str, Any]] = {
    "on_step": {"step": 1, "metrics": {}},
    "on_evaluate": {"step": 1, "metrics": {}},
    "on_save": {"step": 1, "path": ""},
    "on_end": {"step": 1, "outcome": ""},
}
"""The methods that a callback class may define, and their arguments."""


def load(text: str) -> Any:
    """A new instance of a callback's class.

    Raises: ConfigError with the line for a file that cannot be run, and for a class that cannot be used.
    """
    made, file = load_named(text)
    try:
        found = made()
    except Exception as error:
        raise ConfigError(f"{made.__name__}() cannot be made: {describe_error(error, file)}") from error
    _check_hooks(found, made.__name__)
    return found


def _check_hooks(callback: Any, name: str) -> None:
    own = [attribute for attribute in dir(callback) if attribute.startswith("on_")]
    if not own:
        raise ConfigError(f"{name} has none of the methods {', '.join(HOOKS)}")
    for hook in own:
        if hook not in HOOKS:
            raise ConfigError(f"{name}.{hook} is never called{near(hook, HOOKS)}")
        given = HOOKS[hook]
        try:
            inspect.signature(getattr(callback, hook)).bind(**given)
        except TypeError as error:
            raise ConfigError(f"{name}.{hook} must take the keywords {', '.join(given)} ({error})") from error
