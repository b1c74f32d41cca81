"""Rules for the servers beside a run's ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megabatch.config.recipe import Recipe
from megabatch.config.roles import Role
from megabatch.config.rules.secrets import no_secrets_in_words
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("rank", "batch", "token", "port", "ports", "task", "stop", "stopped", "failed", "preflight", "fruitless")
"""Names of other logs, markers and variables."""


def role_faults(roles: Sequence[Role]) -> Iterator[Fault]:
    """Names that cannot be used, and numbers and texts that make no sense."""
    if not all(isinstance(role, Role) for role in roles):
        yield Fault("roles", None, "must consist of Role(…)", bare=True)
        return
    names = [role.name for role in roles]
    for role in roles:
        place = f"roles[{role.name!r}]"
        if not _NAME.fullmatch(role.name) or role.name in _TAKEN:
            rule = f"must consist of lower-case letters, digits and underscores, and not be {', '.join(_TAKEN)}"
            yield Fault(f"{place}.name", role.name, rule)
        if names.count(role.name) > 1:
            yield Fault(f"{place}.name", role.name, f"names {names.count(role.name)} roles; each needs its own")
        if not role.command or isinstance(role.command, str):
            yield Fault(f"{place}.command", None, "must be a list of the program and its arguments", bare=True)
        else:
            yield from no_secrets_in_words(f"{place}.command", role.command)
        yield from no_secrets_in_words(f"{place}.health", [role.health])
        for number in ("nodes", "tasks_per_node", "ready_s"):
            if getattr(role, number) < 1:
                yield Fault(f"{place}.{number}", getattr(role, number), "must be at least 1")
        if not role.health.startswith("/") or not role.health.isprintable() or " " in role.health:
            yield Fault(f"{place}.health", role.health, "must be a path without spaces", try_=("/health",))


def _roles(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    return role_faults(recipe.roles)


RULES = (_roles,)
