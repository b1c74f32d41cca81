"""Models behind servers: addresses that can be asked, and settings that a server leaves without effect."""

from __future__ import annotations

from collections.abc import Iterator

from megabatch.config.declare import group_types
from megabatch.config.recipe import Recipe
from megabatch.config.reference import references_named
from megabatch.config.rules import rollout
from megabatch.config.rules.preference import without_reference
from megabatch.config.served_models import REFERENCE, ROLE, TEACHER, ServedModel, addresses_named
from megabatch.config.server_addresses import EXAMPLE, address_fault
from megabatch.config.several_teachers import teachers_named
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def _name(recipe: Recipe) -> str | None:
    return None if recipe.kind is None else recipe.kind.name


def servers_can_be_asked(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    """Addresses that are some, a key that is used, and settings of servers that need one."""
    for model in (TEACHER, REFERENCE):
        if model is TEACHER and _name(recipe) not in ("gkd", "grpo"):
            continue  # no task but these reads the group
        named = model.named(recipe)
        if named is None:
            yield from _without_server(recipe, model)
        else:
            yield from _addresses(recipe, model, named)


def _without_server(recipe: Recipe, model: ServedModel) -> Iterator[Fault]:
    group, defaults = getattr(recipe, model.group), group_types(Recipe)[model.group]()
    for name in (model.key_variable, model.timeout):
        if (value := getattr(group, name)) != (default := getattr(defaults, name)):
            yield Fault(f"{model.group}.{name}", value, f"has no effect without {model.server}", try_=(default,))


def _addresses(recipe: Recipe, model: ServedModel, named: str) -> Iterator[Fault]:
    try:
        wheres = [one.where for one in teachers_named(named, "url")] if model is TEACHER else [named]
    except ValueError as e:
        yield Fault(model.field, named, str(e))
        return
    found = [address for where in wheres for address in addresses_named(where)]
    for address in found:
        yield from _address(recipe, model, address)
    key = model.key_variable_of(recipe)
    if key is not None and all(address.startswith(ROLE) for address in found):
        rule = f"has no effect with {model.server}={named!r}, which has the job's own token"
        yield Fault(f"{model.group}.{model.key_variable}", key, rule, try_=(None,))


def _address(recipe: Recipe, model: ServedModel, address: str) -> Iterator[Fault]:
    kind, _, name = address.partition(":")
    roles = [role.name for role in recipe.roles]
    if kind == "role" and name not in roles:
        rule = f"names no role of the recipe, which has {', '.join(roles) or 'none'}"
        yield Fault(model.field, address, rule, try_=[f"{ROLE}{role}" for role in roles])
    elif kind == "role" and name == rollout.ROLE and recipe.rollout.vllm_mode == "server":
        rule = f"names the role that generates, whose servers get the policy's weights; give the {model.what} its own"
        yield Fault(model.field, address, rule)
    elif kind != "role" and (why := address_fault(address)) is not None:
        yield Fault(model.field, address, f"{why}, or role:NAME", try_=(EXAMPLE,))


def a_served_reference_is_the_only_one(
    recipe: Recipe, shape: ModelShape | None, layout: Layout | None
) -> Iterator[Fault]:
    """Nothing else names it, and nothing changes it."""
    if (server := REFERENCE.named(recipe)) is None:
        return
    if (why := without_reference(recipe)) is not None:
        yield Fault(REFERENCE.field, server, f"has no effect: {why} has no reference", try_=(None,))
        return
    if (name := _name(recipe)) != "grpo":
        rule = (
            f"is for rlhf_type='grpo'; {name} has its reference in the ranks, or none in memory with "
            "precompute_ref_log_probs=True"
        )
        yield Fault(REFERENCE.field, server, rule, try_=(None,))
        return
    for field, value in references_named(recipe).items():
        rule = f"has no effect with {REFERENCE.server}={server!r}, which has the reference; give one"
        yield Fault(field, value, rule, try_=(None,))
    if recipe.rlhf.sync_ref_model:
        rule = f"cannot change the model behind {REFERENCE.server}={server!r}, which stays as it is"
        yield Fault("rlhf.sync_ref_model", True, rule, try_=(False,))


RULES = (servers_can_be_asked, a_served_reference_is_the_only_one)
