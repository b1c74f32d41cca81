"""The command line of a recipe: every parameter as a flag, flat or dotted, under its name or an alias.

--tensor_model_parallel_size 4    --parallel.tensor_model_parallel_size=4    --sequence_parallel
--dataset a.jsonl b.jsonl         --rope_fusion false (for no_rope_fusion)   --submit --dry_run --local
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from megabatch.config.declare import Parameter, group_types, parameters
from megabatch.config.field_types import fits, is_boolean, is_list, read, spelled
from megabatch.config.foreign_names import OF_THE_CLUSTER, OTHERWISE, QLORA, WITHOUT
from megabatch.config.new_model import without_new_model
from megabatch.config.recipe import Recipe
from megabatch.errors import ConfigError, Fault
from megabatch.tasks import find_task
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Actions:
    """What to do with the recipe: flags of the command line, not parameters of the run."""

    submit: bool = False
    """Submit the run to Slurm."""
    local: bool = False
    """Run on this machine, one process per rank."""
    dry_run: bool = False
    """Print the plan and the exact sbatch script; write and submit nothing."""
    cluster: str | None = None
    """Cluster profile to submit with."""
    run_dir: str | None = None
    """Run directory; default: a new one in `save`."""
    chain: int | None = None
    """Submit the run as that many jobs, each continuing where the previous one stopped: for clusters without
    requeue."""
    sweep: tuple[str, ...] = ()
    """Run every combination of parameter values instead of one run: `--sweep lr=1e-5,2e-5 seed=1,2`."""
    max_parallel: int | None = None
    """Largest number of a sweep's runs at a time."""
    keep_all: bool = False
    """Keep points of a sweep that only the estimates reject: memory, or groups of ranks that cross nodes."""
    gpu: str | None = None
    """GPU for a sweep's memory and time estimates: A100, H100, H200, …; None means the cluster profile's, or
    H100."""
    help: bool = False
    """Show all flags and exit."""


_ACTIONS = {field.name: field.default is False for field in dataclasses.fields(Actions)}
"""Flag of the command line itself → whether it takes no value."""
_TOP = ("name", "task")
_LONGEST_CHAIN = 1000
"""Far above what a run needs; one digit too many would fill the queue."""


def parse(arguments: Sequence[str], recipe: Recipe) -> tuple[Actions, Recipe]:
    """Actions, and the recipe with the flags' values applied; with `--help` nothing else is read.

    Raises: ConfigError with every unknown name, wrong value and double spelling at once.
    """
    if "--help" in arguments or "-h" in arguments:
        return Actions(help=True), recipe
    faults: list[Fault] = []
    given: dict[str, _Given] = {}
    actions: dict[str, Any] = {}
    flags = list(_flags(arguments, faults))
    algorithm = _algorithm(flags, recipe)
    for name, texts in flags:
        if name in _ACTIONS:
            _take_action(name, texts, actions, faults)
        else:
            _take_parameter(name, texts, algorithm, given, faults)
    if faults:
        raise ConfigError(faults)
    return Actions(**actions), overridden(recipe, {dotted: one.value for dotted, one in given.items()})


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter under one of its names."""

    parameter: Parameter
    negated: bool
    """The name is an alias with the opposite meaning."""

    def typed(self, value: Any) -> Any:
        """A value given in Python, as a recipe holds it. Raises: ValueError if its type is wrong."""
        value = tuple(value) if isinstance(value, list) else value
        if not fits(value, self.parameter.hint):
            raise ValueError(f"must be {spelled(self.parameter.hint)}")
        return not value if self.negated and isinstance(value, bool) else value

    def values(self, text: str) -> list[Any]:
        """The values in `1,2,4`, or in a JSON array if a value is a list or contains a comma, each read like a flag's.

        Raises: ValueError if one cannot be read.
        """
        if text.lstrip().startswith("["):
            texts = [one if isinstance(one, str) else json.dumps(one) for one in json.loads(text)]
        else:
            texts = text.split(",") if text else []
        read_ = [read([one.strip()], self.parameter.hint) for one in texts]
        return [not value if self.negated and isinstance(value, bool) else value for value in read_]


def named(name: str, recipe: Recipe) -> Named | Fault:
    """The parameter of a flag's name, or a fault that suggests the nearest ones.

    `beta` and `loss_type` are those of the recipe's algorithm.
    """
    return _find(name.replace("-", "_"), _algorithm((), recipe))


def overridden(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with values by dotted name (`parallel.context_parallel_size`, `name`) in place of its own.

    A given model in place of a new one brings its shape: what the recipe says of the new one's is left out.
    """
    if recipe.model.model is None and values.get("model.model") is not None:
        recipe = without_new_model(recipe)
    groups: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for dotted, value in values.items():
        group, _, name = dotted.partition(".")
        if name:
            groups.setdefault(group, {})[name] = value
        else:
            top[dotted] = value
    changed = {group: dataclasses.replace(getattr(recipe, group), **fields) for group, fields in groups.items()}
    return dataclasses.replace(recipe, **top, **changed)


@dataclass(frozen=True, slots=True)
class _Given:
    spelling: str
    value: Any


def _flags(arguments: Sequence[str], faults: list[Fault]) -> Iterator[tuple[str, list[str]]]:
    """Name and texts of each flag; hyphens in names are read as underscores."""
    name: str | None = None
    texts: list[str] = []
    for argument in arguments:
        if not argument.startswith("--"):
            if name is None or (_ACTIONS.get(name) and "=" in argument):
                faults.append(_stray(argument))
            else:
                texts.append(argument)
            continue
        if name is not None:
            yield name, texts
        spelled, equals, value = argument[2:].partition("=")
        name, texts = spelled.replace("-", "_"), [value] if equals else []
    if name is not None:
        yield name, texts


def _stray(argument: str) -> Fault:
    """What belongs to no flag, such as Hydra's `trainer.devices=8`; suggests the flag that is meant."""
    key, equals, value = argument.lstrip("+-").partition("=")
    meant = _find(key, None) if equals else None
    near = [f"--{key} {value}"] if isinstance(meant, Named) else meant.try_ if meant else ()
    return Fault(argument, None, "is not a flag; flags begin with --", try_=near, bare=True)


def _algorithm(flags: Sequence[tuple[str, list[str]]], recipe: Recipe) -> str | None:
    """The group whose `beta` and `loss_type` are meant; None for a task that has none."""
    task, algorithm, task_type = recipe.task, recipe.rlhf.rlhf_type, recipe.training.task_type
    for name, texts in flags:
        if name == "task" and texts:
            task = texts[0]  # type: ignore[assignment]
        if name in ("rlhf_type", "rlhf.rlhf_type") and texts:
            algorithm = texts[0]  # type: ignore[assignment]
        if name in ("task_type", "training.task_type") and texts:
            task_type = texts[0]  # type: ignore[assignment]
    found = find_task(task, rlhf_type=algorithm, task_type=task_type)
    return found.name if found is not None and found.name in group_types(Recipe) else None


def _take_action(name: str, texts: list[str], actions: dict[str, Any], faults: list[Fault]) -> None:
    alone = _ACTIONS[name]
    if name == "sweep":
        if not texts:
            rule = "needs at least one parameter=value,value"
            faults.append(Fault("--sweep", None, rule, try_=("--sweep seed=1,2,3",), bare=True))
        actions["sweep"] = (*actions.get("sweep", ()), *texts)
    elif alone and texts:
        faults.append(Fault(f"--{name}", None, f"takes no value, but got {texts[0]!r}", bare=True))
    elif not alone and len(texts) != 1:
        faults.append(Fault(f"--{name}", None, "needs one value", bare=True))
    elif not alone and not texts[0].strip():
        faults.append(Fault(f"--{name}", texts[0], "is blank; give a value, or leave it out"))
    elif name in actions:
        faults.append(Fault(f"--{name}", None, "is given twice", bare=True))
    elif name in ("max_parallel", "chain"):
        if not (texts[0].isdecimal() and int(texts[0])):
            faults.append(Fault(f"--{name}", texts[0], "must be a whole number, at least 1"))
        elif name == "chain" and int(texts[0]) > _LONGEST_CHAIN:
            faults.append(Fault("--chain", texts[0], f"would queue as many jobs; give at most {_LONGEST_CHAIN}"))
        actions[name] = int(texts[0]) if texts[0].isdecimal() else None
    else:
        actions[name] = True if alone else texts[0]


def _take_parameter(
    name: str, texts: list[str], algorithm: str | None, given: dict[str, _Given], faults: list[Fault]
) -> None:
    dotted, value = _top(name, texts) if name in _TOP else _parameter(name, texts, algorithm)
    if isinstance(value, Fault):
        faults.append(value)
    elif dotted in given:
        before = given[dotted].spelling
        rule = "is given twice" if before == name else f"was already given as --{before}; give one of them"
        faults.append(Fault(f"--{name}", None, rule, bare=True))
    else:
        given[dotted] = _Given(name, value)


def _top(name: str, texts: list[str]) -> tuple[str, Any]:
    return name, texts[0] if len(texts) == 1 else Fault(f"--{name}", None, "needs one value", bare=True)


def _parameter(name: str, texts: list[str], algorithm: str | None) -> tuple[str, Any]:
    found = _find(name, algorithm)
    return (name, found) if isinstance(found, Fault) else (found.parameter.dotted, _value(found, texts))


def _value(named: Named, texts: list[str]) -> Any:
    """The value of a flag's texts, or the fault in them."""
    parameter, hint = named.parameter, named.parameter.hint
    secret = parameter.name == "hub_token"
    if not texts and is_boolean(hint):
        texts = ["true"]
    if not texts:
        return Fault(parameter.dotted, None, "needs a value", bare=True)
    if len(texts) > 1 and not is_list(hint):
        return Fault(parameter.dotted, None, f"takes one value, but got {len(texts)}", bare=True)
    try:
        value = read(texts, hint)
    except ValueError as error:
        return Fault(parameter.dotted, " ".join(texts), str(error), bare=secret)
    return not value if named.negated and isinstance(value, bool) else value


def _find(name: str, algorithm: str | None) -> Named | Fault:
    """The parameter of that name, or the fault that names the nearest ones."""
    found = _names().get(name, ())
    if len(found) > 1 and algorithm is not None:
        found = tuple(named for named in found if named.parameter.group == algorithm)
    if len(found) == 1:
        return found[0]
    if len(found) > 1 or name in _names():
        dotted = [named.parameter.dotted for named in _names()[name]]
        return Fault(f"--{name}", None, "belongs to several algorithms; name one", try_=_dashed(dotted), bare=True)
    group, _, field = name.partition(".")
    known = [*_names(), *_ACTIONS, *_TOP]
    if field and group in group_types(Recipe):
        known = [dotted for dotted in known if dotted.startswith(f"{group}.")]
    for ending in _endings(name):
        if foreign := _foreign(ending):
            rule, near = foreign
            return Fault(f"--{name}", None, rule, try_=_dashed(near), bare=True)
        if ending in _names() and (group not in group_types(Recipe) or "." in field):
            return Fault(f"--{name}", None, "is not a parameter", try_=_dashed([ending]), bare=True)
    near = sorted(get_close_matches(name, known, n=3, cutoff=0.7), key=lambda one: _is_second(one, name))
    return Fault(f"--{name}", None, "is not a parameter", try_=_dashed(near[:2]), bare=True)


def _endings(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c` of `a.b.c`: other programs have groups of their own."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _foreign(name: str) -> tuple[str, Sequence[str]] | None:
    """Of a name that other programs know: the rule, and parameters to try."""
    if name in OF_THE_CLUSTER:
        return "belongs in the cluster profile that --cluster names, not in a run", ()
    if name in QLORA:
        rule = "asks for QLoRA, which is not supported: the frozen weights stay in bf16 or fp32"
        return rule, ("tuner_type lora with more ranks",)
    if name in WITHOUT:
        return WITHOUT[name], ()
    if name in OTHERWISE:
        return "is not a parameter", OTHERWISE[name]
    return None


def _is_second(suggested: str, name: str) -> tuple[bool, bool]:
    """Behind others: what is not built, and settings of an engine where no engine was named."""
    return _is_unbuilt(suggested), suggested.startswith("vllm_") and not name.startswith("vllm")


def _is_unbuilt(name: str) -> bool:
    return any(named.parameter.facts.built is False for named in _names().get(name, ()))


def _dashed(names: Sequence[str]) -> list[str]:
    return [f"--{name}" for name in names]


@functools.cache
def _names() -> Mapping[str, tuple[Named, ...]]:
    """Every spelling of every parameter, flat and dotted."""
    index: dict[str, tuple[Named, ...]] = {}
    for parameter in parameters(Recipe):
        facts = parameter.facts
        spellings = [(name, False) for name in (parameter.name, *facts.aliases)]
        for name, negated in [*spellings, *((alias, True) for alias in facts.negated_aliases)]:
            for spelling in (name, f"{parameter.group}.{name}"):
                index[spelling] = (*index.get(spelling, ()), Named(parameter, negated))
    return index
