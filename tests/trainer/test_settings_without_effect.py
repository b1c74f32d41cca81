"""What a run says of settings that change speed alone and have no effect in it."""

from __future__ import annotations

import pytest

from megabatch import Recipe
from megabatch.config.declare import Parameter, parameters
from megabatch.trainer.settings_without_effect import CUDA, NEVER, TRANSFORMER_ENGINE, reason_without_effect

KNOWN: dict[str, Parameter] = {one.name: one for one in parameters(Recipe)}


@pytest.mark.parametrize("name", TRANSFORMER_ENGINE)
def test_local_layers_have_none_of_transformer_engines_kernels(name: str) -> None:
    found = reason_without_effect(KNOWN[name], why_local="transformer_impl='local'")
    assert found == "it is Transformer Engine's, and the run has local layers (transformer_impl='local')"
    assert reason_without_effect(KNOWN[name], why_local=None) is None


def test_every_name_is_that_of_a_parameter() -> None:
    assert {*TRANSFORMER_ENGINE, *CUDA, *NEVER} <= KNOWN.keys()
    assert not {*TRANSFORMER_ENGINE} & {*CUDA}
