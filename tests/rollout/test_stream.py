"""Buckets between a trainer and a server's workers: two ranks of a group in this process, with the real gloo."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket, Part
from megabatch.rollout.vllm.group import Group, join, meet, open_store
from megabatch.rollout.vllm.stream import Buffers, arriving, send, send_end

CPU = torch.device("cpu")
SIZE = 1 << 16


@dataclass
class Ends:
    """The two ends of a stream."""

    trainer: Group
    worker: Group
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


@pytest.fixture
def ends() -> Iterator[Ends]:
    store = open_store(timeout_s=20)
    with ThreadPoolExecutor(1) as thread:
        worker = thread.submit(join, "127.0.0.1", store.port, rank=1, size=2, device=CPU, timeout_s=20)
        trainer = meet(store, size=2, device=CPU, timeout_s=20, failed=lambda: None)
        found = Ends(trainer, worker.result())
    yield found
    found.trainer.close()
    found.worker.close()
    found.thread.shutdown()


def bucket(number: int, size: int = SIZE) -> Bucket:
    data = memoryview(bytearray([number % 251] * size))
    return Bucket((Part(f"tensor {number}", "U8", (size,), 0, 0, size),), data)


def tensor_of(one: Bucket) -> torch.Tensor:
    return torch.frombuffer(one.data, dtype=torch.uint8)


def send_all(group: Group, buckets: list[Bucket]) -> None:
    for one in buckets:
        send(group, one)
    send_end(group)


def test_buckets_arrive_in_order_and_stay_while_a_tensor_looks_at_them(ends: Ends) -> None:
    sent = [bucket(number, SIZE - number) for number in range(9)]
    sending = ends.thread.submit(send_all, ends.trainer, sent)
    kept: list[torch.Tensor] = []
    places = set()
    for number, one in enumerate(arriving(ends.worker, Buffers())):
        assert one.parts == sent[number].parts
        tensor = tensor_of(one)
        places.add(tensor.data_ptr())
        if number % 4 == 0:
            kept.append(tensor)
    sending.result()
    assert [set(tensor.tolist()) for tensor in kept] == [{0}, {4}, {8}]
    assert len(places) < len(sent), "the memory of the others is used again"


def test_a_trainer_that_leaves_ends_the_update(ends: Ends) -> None:
    sending = ends.thread.submit(send, ends.trainer, bucket(1))
    buckets = arriving(ends.worker, Buffers())
    assert set(tensor_of(next(buckets)).tolist()) == {1}
    sending.result()
    ends.trainer.close()
    with pytest.raises(RuntimeError, match=r"closed by peer|reset by peer|Broken pipe"):
        next(buckets)


def test_a_worker_that_leaves_ends_the_update(ends: Ends) -> None:
    ends.worker.close()
    with pytest.raises(RuntimeError, match=r"closed by peer|reset by peer|Broken pipe"):
        send(ends.trainer, bucket(1))


def test_a_bucket_that_changed_on_its_way_is_refused(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bucket(1)
    manifest = {**one.manifest(), "xxh3": "0" * 16}
    monkeypatch.setattr(Bucket, "manifest", lambda bucket: manifest)
    sending = ends.thread.submit(send, ends.trainer, one)
    with pytest.raises(RolloutError, match=r"a bucket of 1 tensors from tensor 1 on arrived with .* is void"):
        next(arriving(ends.worker, Buffers()))
    sending.result()
