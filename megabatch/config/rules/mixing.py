"""Datasets that are mixed at random: a probability for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megabatch.config.data import Data
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.plan.layout import Layout
from megabatch.plan.shape import ModelShape


def each_dataset_has_a_probability(recipe: Recipe, shape: ModelShape | None, layout: Layout | None) -> Iterator[Fault]:
    data, name = recipe.data, "data.interleave_prob"
    given = data.interleave_prob
    if given is None:
        if data.stopping_strategy != Data().stopping_strategy:
            yield Fault("data.stopping_strategy", data.stopping_strategy, "has no effect without interleave_prob")
        return
    count = len(data.dataset)
    if len(given) != count:
        yield Fault(name, given, f"has {len(given)} probabilities, and data.dataset {count}: give one for each")
    elif not all(0 < one <= 1 for one in given):
        yield Fault(name, given, "must be probabilities above 0; leave a dataset out that is never drawn")
    elif not math.isclose(total := math.fsum(given), 1, abs_tol=1e-6):
        yield Fault(name, given, f"must add up to 1, not {total:g}", try_=([round(one / total, 6) for one in given],))


RULES = (each_dataset_has_a_probability,)
