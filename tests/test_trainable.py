"""What the trainer builds, and the reasons against the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megabatch.config.rules.windows import FAMILIES as WINDOWED
from megabatch.converters.families import FAMILIES
from megabatch.errors import ConversionError
from megabatch.plan.published_models import KNOWN_MODELS
from megabatch.trainable import BUILT, UNBUILT, untrainable

CONFIG = KNOWN_MODELS["Qwen/Qwen3-30B-A3B"]
"""Has the keys that each built family reads."""


def test_every_family_that_is_converted_is_built_or_has_a_reason() -> None:
    assert {*BUILT, *UNBUILT} == set(FAMILIES)
    assert not {*BUILT} & {*UNBUILT}


@pytest.mark.parametrize("model_type", BUILT)
def test_a_built_family_reads_more_than_decides_its_tensors(model_type: str) -> None:
    config = CONFIG | {"architectures": [], "rope_theta": 123.0}
    assert FAMILIES[model_type].shape(config).rotary_base == 123
    windowed = config | {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}
    if model_type in WINDOWED:
        assert FAMILIES[model_type].shape(windowed).sliding_window == 9
    else:
        with pytest.raises(ConversionError, match="use_sliding_window=true with sliding_window=9 is not supported"):
            FAMILIES[model_type].shape(windowed)


def test_reasons_name_the_setting() -> None:
    shape = FAMILIES["qwen2"].shape(CONFIG)
    assert untrainable(shape) is None
    assert untrainable(replace(shape, rope_scaling={"rope_type": "llama3"}, sliding_window=7)) is None
    assert untrainable(replace(shape, num_labels=2)) is None, "a score head"
    assert "rope_type='yarn'" in str(untrainable(replace(shape, rope_scaling={"rope_type": "yarn"})))


def test_a_family_that_is_not_built_gives_that_reason_alone() -> None:
    shape = replace(FAMILIES["qwen2"].shape(CONFIG), model_type="gpt_oss", sliding_window=128)
    assert str(untrainable(shape)).startswith(
        "the trainer does not support attention sinks and clamped activations yet;"
    )
    assert "sliding_window" not in str(untrainable(shape))
    assert "model_type=new" in str(untrainable(replace(shape, model_type="new")))
