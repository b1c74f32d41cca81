"""Every parameter of the reference is declared, documented, and refused for as short a time as possible."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

import megabatch
from megabatch.config.declare import group_types, named, parameters
from megabatch.config.docstrings import field_docs
from megabatch.config.document import document
from megabatch.config.field_types import fits
from megabatch.config.recipe import Recipe

ROOT = Path(megabatch.__file__).parents[1]
REFERENCE = [
    line.split("\t")
    for line in (Path(__file__).parent / "reference_parameters.tsv").read_text(encoding="utf-8").splitlines()
]
NOT_BUILT, PARTLY_BUILT = 48, 15
"""Parameters of which the trainer has only the default, and of which it has only some values. They may only fall."""


def test_reference_is_complete():
    names = {name for _, name in REFERENCE}
    assert len(names) == 298
    assert names - {parameter.name for parameter in parameters(Recipe)} == set()


def test_only_beta_and_loss_type_belong_to_several_algorithms():
    repeated = [name for name, count in Counter(one.name for one in parameters(Recipe)).items() if count > 1]
    assert sorted(repeated) == ["beta", "loss_type"]
    assert {one.group: one.default for one in named(parameters(Recipe), "beta")} == {
        "dpo": 0.1,
        "kto": 0.1,
        "grpo": 0.04,
        "gkd": 0.5,
    }


def test_parameters_not_built_yet_only_become_fewer():
    facts = [parameter.facts.built for parameter in parameters(Recipe)]
    not_built, partly = facts.count(False), sum(isinstance(built, tuple) for built in facts)
    assert not_built <= NOT_BUILT and not_built + partly <= NOT_BUILT + PARTLY_BUILT


@pytest.mark.parametrize("group", group_types(Recipe))
def test_every_field_is_documented(group):
    group_type = group_types(Recipe)[group]
    assert group_type.__doc__ and not group_type.__doc__.startswith(f"{group_type.__name__}(")
    docs = field_docs(group_type)
    for name in (parameter.name for parameter in parameters(Recipe) if parameter.group == group):
        assert len(docs.get(name, "")) > 10, f"{group}.{name} has no docstring beneath it"


def test_defaults_have_their_declared_type_and_range():
    for parameter in parameters(Recipe):
        assert fits(parameter.default, parameter.hint), parameter.dotted
        if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
            assert parameter.facts.allows(parameter.default), parameter.dotted


def test_built_values_have_the_declared_type():
    for parameter in parameters(Recipe):
        built = parameter.facts.built
        for value in built if isinstance(built, tuple) else ():
            assert fits(value, parameter.hint) or fits((value,), parameter.hint), parameter.dotted


def test_spellings_are_unique():
    names = [parameter.name for parameter in parameters(Recipe)]
    aliases = [
        alias
        for parameter in parameters(Recipe)
        for alias in (*parameter.facts.aliases, *parameter.facts.negated_aliases)
    ]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & {*names, "name", "task"}


def test_negated_aliases_belong_to_switches():
    for parameter in parameters(Recipe):
        assert not parameter.facts.negated_aliases or parameter.hint is bool


def test_groups_are_plain_frozen_dataclasses(dense):
    for group, group_type in group_types(Recipe).items():
        assert group_type.__bases__ == (object,) and all(field.kw_only for field in fields(group_type))
        with pytest.raises(FrozenInstanceError):
            setattr(getattr(dense, group), fields(group_type)[0].name, None)
        assert not hasattr(getattr(dense, group), "__dict__")


def test_public_names_are_the_groups_and_main():
    exported = {group_type.__name__ for group_type in group_types(Recipe).values()}
    steps = {"Chain", "Command", "ConversionRequest", "Convert", "Role", "Step"}
    edges = {"ended", "notok", "ok", "output", "singleton"}
    assert set(megabatch.__all__) == exported | steps | edges | {"Recipe", "Sweep", "main"}


def test_reference_page_is_current():
    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert page == document(), "run: python -m megabatch.config.document > docs/parameters.md"


def test_config_and_plan_stay_free_of_third_parties():
    """config/ and plan/ import the standard library, each other and a few modules of one job."""
    for folder in ("config", "plan"):
        for path in (ROOT / "megabatch" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for module in modules:
                    own = (
                        "config",
                        "plan",
                        "errors",
                        "loss_scales",
                        "values",
                        "run_directory",
                        "secret_text",
                        "tasks",
                        "user_code",
                    )
                    allowed = tuple(f"megabatch.{name}" for name in own)
                    third_party = module.split(".")[0] not in sys.stdlib_module_names
                    assert not third_party or module.startswith(allowed), f"{path} imports {module}"
