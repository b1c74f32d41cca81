"""The text of `--help`, generated from the declarations."""

from __future__ import annotations

import textwrap

from megabatch.config.declare import Parameter, group_types, parameters
from megabatch.config.docstrings import field_docs
from megabatch.config.field_types import spelled
from megabatch.config.flags import Actions
from megabatch.config.recipe import Recipe

_INDENT = " " * 8
_WIDTH = 110


def help_text(usage: str) -> str:
    """All flags with type, default, state and meaning, group by group."""
    lines = [
        f"usage: {usage} [flags]",
        "",
        "Every flag may be spelled flat (--lr) or dotted (--learning_rate.lr).",
        "",
    ]
    for name, doc in field_docs(Actions).items():
        lines += [f"  --{name}", _wrapped(doc)]
    for group, group_type in group_types(Recipe).items():
        summary = (group_type.__doc__ or "").strip().splitlines()[0]
        lines += ["", f"{group}: {summary}"]
        docs = field_docs(group_type)
        for parameter in (one for one in parameters(Recipe) if one.group == group):
            lines += [f"  --{parameter.name}  {_facts(parameter)}", _wrapped(docs[parameter.name])]
    return "\n".join(lines)


def _facts(parameter: Parameter) -> str:
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    facts = [spelled(parameter.hint), f"default {default}"]
    if parameter.facts.limits():
        facts.insert(1, parameter.facts.limits())
    if parameter.state != "built":
        facts.append(parameter.state)
    names = [*parameter.facts.aliases, *(f"{alias} (opposite)" for alias in parameter.facts.negated_aliases)]
    if names:
        facts.append(f"also --{', --'.join(names)}")
    return f"({'; '.join(facts)})"


def _wrapped(doc: str) -> str:
    return textwrap.fill(" ".join(doc.split()), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
