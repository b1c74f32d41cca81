"""Batches on their way to the GPU."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from megabatch.data.tokens.sample import Sample
from megabatch.trainer.pack import collate

pytestmark = pytest.mark.gpu


def test_prepared_batches_are_pinned_and_arrive_unchanged() -> None:
    samples = [Sample(np.arange(n), np.ones(n, np.float32), {"number": n}) for n in (5, 9)]
    plain = collate(samples)
    pinned = plain.pinned()
    there = pinned.to("cuda")
    torch.cuda.synchronize()
    for field in fields(plain):
        value = getattr(plain, field.name)
        if isinstance(value, Tensor):
            assert getattr(pinned, field.name).is_pinned()
            assert torch.equal(getattr(there, field.name).cpu(), value)
    assert pinned.columns["number"].is_pinned()
