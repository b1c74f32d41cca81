"""What a chain file builds: steps, what each does, and which steps it waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, field
from typing import TYPE_CHECKING, Literal

from megabatch.chain.outputs import reference
from megabatch.config.recipe import Recipe
from megabatch.config.resources import Resources
from megabatch.config.roles import Role
from megabatch.values import dataclass

if TYPE_CHECKING:  # a recipe without conversions does not need the tables
    from megabatch.converters.request import ConversionRequest

_ON_CPUS = Resources(gpus_per_node=0, time="4:00:00")


@dataclass(frozen=True, slots=True)
class Edge:
    """One condition of a step's start."""

    kind: Literal["ok", "notok", "any", "singleton"]
    step: str = ""
    """The step waited for; empty for `singleton`."""


def ok(*steps: str) -> tuple[Edge, ...]:
    """Starts once these steps have succeeded (`afterok`)."""
    return tuple(Edge("ok", step) for step in steps)


def notok(*steps: str) -> tuple[Edge, ...]:
    """Starts once these steps have failed or can never run (`afternotok`)."""
    return tuple(Edge("notok", step) for step in steps)


def ended(*steps: str) -> tuple[Edge, ...]:
    """Starts once these steps have ended in any way (`afterany`)."""
    return tuple(Edge("any", step) for step in steps)


def singleton() -> tuple[Edge, ...]:
    """Starts when no other job of this user with the same job name, `<chain>-<step>`, is in the queue before it."""
    return (Edge("singleton"),)


@dataclass(frozen=True, slots=True)
class Output:
    """A step's output for another step to read: each property stands for a path that is known after the step."""

    step: str

    @property
    def hf(self) -> str:
        """Hugging Face folder: of a training step's last checkpoint, or of a conversion `to_hf`."""
        return reference(self.step, "hf")

    @property
    def mcore(self) -> str:
        """megatron-core checkpoint: of a training step's last checkpoint, or of a conversion `to_mcore`."""
        return reference(self.step, "mcore")

    @property
    def checkpoint(self) -> str:
        """A training step's last checkpoint, whole: another training step can `load` it and continue from there."""
        return reference(self.step, "checkpoint")

    @property
    def folder(self) -> str:
        """The step's own folder, with its logs."""
        return reference(self.step, "folder")

    def file(self, name: str) -> str:
        """A file that a `Command` declares under `outputs`."""
        return reference(self.step, f"file {name}")


def output(step: str) -> Output:
    """The output of the step of that name."""
    return Output(step)


@dataclass(frozen=True, slots=True)
class Convert:
    """A conversion by `megabatch-convert`; all tasks of the job share the work."""

    request: ConversionRequest
    """Source, target and form of the conversion."""
    _: KW_ONLY
    workers: int | None = None
    """Threads of each task; None means one per processor, at most 8."""
    verify: bool = False
    """Compares every byte with its source before the result gets its name."""
    resources: Resources = _ON_CPUS
    """Nodes, tasks, memory and time; it needs no GPU."""


@dataclass(frozen=True, slots=True)
class Command:
    """Any program, run by each task of the job; `python` as its first word means the ranks' interpreter."""

    argv: Sequence[str]
    """The program and its arguments, passed without a shell."""
    outputs: Sequence[str] = ()
    """Files that it makes, relative to its step's folder (`MEGABATCH_RUN`), for `output(step).file(name)`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its tasks; no secrets: those are named under `inherit`."""
    inherit: Sequence[str] = ()
    """Names of variables (secrets) that come from the submitting shell."""
    roles: Sequence[Role] = ()
    """Servers on nodes of their own that run as long as the program."""
    resources: Resources = _ON_CPUS
    """Nodes, tasks, GPUs, memory and time."""


Work = Recipe | Convert | Command


@dataclass(frozen=True, slots=True)
class Step:
    """One job of a chain."""

    name: str
    """Letters, digits, dot, dash and underscore; also the name of its folder."""
    work: Work
    """A training run, a conversion or a command."""
    after: Sequence[Edge] = ()
    """All conditions for its start: `ok("train")`, `ok("a", "b")`, `(*ended("a"), *singleton())`, …"""
    links: int = 1
    """Jobs of a training run, each continuing where the one before stopped, for clusters without requeue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """Jobs that wait for each other."""

    name: str
    """Names the chain: letters, digits, dot, dash and underscore."""
    steps: Sequence[Step]
    save: str | None = None
    """Folder of the chain, with one for each step; None means `megatron_output/<name>`."""
