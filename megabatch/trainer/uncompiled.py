"""Runs what others would compile as it was written, and leaves torch's compiler where it is: on disk.

Importing it is a tenth of a rank's start on CPUs, and torch does so in places that compile nothing. Each change says
of which torch it is; one that does otherwise imports its compiler again, and `tests/trainer/test_uncompiled.py` fails.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint


def run_uncompiled() -> None:
    """From now on nothing in this process is compiled, whoever asks."""
    if "torch._dynamo" in sys.modules:  # something may be compiled already
        torch.compiler.set_stance("force_eager")
        return
    compiler = torch.compile

    @functools.wraps(compiler)
    def compile_nothing(*arguments: Any, **options: Any) -> Any:
        torch.compiler.set_stance("force_eager")  # imports the compiler
        return compiler(*arguments, **options)

    torch.compile = compile_nothing
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        _call_as_written(getattr(torch.optim.Optimizer, name))
    _call_as_written(torch.utils.checkpoint.checkpoint)
    for optimizer in vars(torch.optim).values():
        if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
            _step_as_written(optimizer)


@contextlib.contextmanager
def decorated_with_nothing() -> Iterator[None]:
    """What is defined meanwhile stays as written where `torch.compile` decorates it."""
    compiler, torch.compile = torch.compile, lambda function=None, **_: function or (lambda inner: inner)
    try:
        yield
    finally:
        torch.compile = compiler


def _call_as_written(function: Any) -> None:
    """torch has the compiler look away from some functions, and imports it when such a one is first called to ask for
    what to call instead, unless it has asked before (`torch._compile`, 2.13)."""
    if plain := getattr(function, "__wrapped__", None):
        plain.__dynamo_disable = plain


def _step_as_written(optimizer: Any) -> None:
    """Where torch's wrapper of `step` sets whether gradients are recorded, it also imports the compiler to tell it to
    stop here (`torch.optim.optimizer._use_grad_for_differentiable`, 2.13). Without the latter it is this."""
    wrapper = vars(optimizer).get("step")
    if getattr(getattr(wrapper, "__code__", None), "co_name", "") != "_use_grad":
        return
    step = wrapper.__wrapped__

    @functools.wraps(step)
    def stepped(self: Any, *arguments: Any, **options: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *arguments, **options)

    optimizer.step = stepped
