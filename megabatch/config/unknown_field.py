"""A recipe file that names a field which does not exist: Python's TypeError, with the nearest names."""

from __future__ import annotations

import re
from difflib import get_close_matches

from megabatch.config.declare import group_types, parameters
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault

_PYTHON = re.compile(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'")


def unknown_field(error: TypeError) -> Fault | None:
    """The fault behind `Parallel(tensor_parallel_size=2)` or a `replace` like it; None for any other TypeError."""
    match = _PYTHON.match(str(error))
    if not match:
        return None
    owner, name = match[1], match[2]
    groups = {group_type.__name__: group for group, group_type in group_types(Recipe).items()}
    elsewhere = [parameter for parameter in parameters(Recipe) if parameter.name == name]
    if elsewhere:
        classes = {group: class_name for class_name, group in groups.items()}
        homes = [f"{classes[parameter.group]}({name}=…)" for parameter in elsewhere]
        return Fault(f"{owner}({name}=…)", None, f"is not a field of {owner}", try_=homes, bare=True)
    if owner == "Recipe":
        known = list(group_types(Recipe))
    else:
        known = [one.name for one in parameters(Recipe) if one.group == groups.get(owner)]
    near = get_close_matches(name, known, n=2)
    return Fault(f"{owner}({name}=…)", None, f"is not a field of {owner}", try_=near, bare=True)
