"""Names that do not exist, in a recipe file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megabatch import Batch, Parallel, Recipe
from megabatch.config.unknown_field import unknown_field


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: Parallel(tensor_parallel_size=2),
            "Parallel(tensor_parallel_size=…) is not a field of Parallel; "
            "try tensor_model_parallel_size or expert_tensor_parallel_size",
        ),
        (
            lambda: replace(Batch(), seed=1),
            "Batch(seed=…) is not a field of Batch; try Training(seed=…)",
        ),
        (
            lambda: Recipe(name="a", task="pt", paralel=Parallel()),
            "Recipe(paralel=…) is not a field of Recipe; try parallel",
        ),
        (
            lambda: Batch(beta=1),
            "Batch(beta=…) is not a field of Batch; try Dpo(beta=…) or Kto(beta=…) or Grpo(beta=…) or Gkd(beta=…)",
        ),
    ],
)
def test_nearest_names(build, text):
    with pytest.raises(TypeError) as error:
        build()
    assert str(unknown_field(error.value)) == text


def test_other_type_errors_are_not_explained():
    with pytest.raises(TypeError) as error:
        len(3)
    assert unknown_field(error.value) is None
