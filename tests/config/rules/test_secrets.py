"""A recipe that holds a secret is refused, and the message does not show it."""

from __future__ import annotations

import pytest

from megabatch.config.rules.check import check


@pytest.mark.parametrize(
    ("changes", "field", "kind"),
    [
        ({"data": {"dataset": ["https://me:hunter2@host/a.jsonl"]}}, "data.dataset", "a URL with a password"),
        ({"model": {"model": "hf://" + "hf_" + "hunter2" * 5}}, "model.model", "a Hugging Face token"),
        ({"training": {"megatron_extra_kwargs": {"wandb_api_key": "hunter2"}}},
         "training.megatron_extra_kwargs", "`wandb_api_key`"),
        ({"training": {"megatron_extra_kwargs": {"a": [{"url": "http://x:hunter2@y"}]}}},
         "training.megatron_extra_kwargs", "a URL with a password"),
    ],
)  # fmt: skip
def test_it_is_named_and_not_shown(dense, changed, changes, field, kind):
    faults = [fault for fault in check(changed(dense, changes)) if "others can read" in str(fault)]
    assert [fault.field for fault in faults] == [field]
    assert f"holds {kind}" in str(faults[0])
    assert "hunter2" not in "".join(map(str, check(changed(dense, changes))))
