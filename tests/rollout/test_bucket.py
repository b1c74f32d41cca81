"""Buckets over a wire: the manifest and the bytes give the bucket again, and wrong bytes are refused."""

from __future__ import annotations

import json

import pytest

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket, Part

DATA = memoryview(bytes(range(48)))
BUCKET = Bucket((Part("a", "F32", (3, 4), 0, 0, 48),), DATA)


def test_a_bucket_survives_the_wire() -> None:
    assert Bucket.of(json.loads(json.dumps(BUCKET.manifest())), DATA) == BUCKET


@pytest.mark.parametrize("data", [bytes(48), bytes(DATA[:-1])])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RolloutError, match=r"1 tensors from a on arrived with .* XXH3"):
        Bucket.of(BUCKET.manifest(), memoryview(data))
