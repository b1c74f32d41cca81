"""How fast this node's devices multiply, and how fast two nodes reduce together; torch is imported inside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_REPEATS = 5
_GPU_SIZE, _CPU_SIZE = 8192, 768
_GPU_BYTES, _CPU_BYTES = 256 << 20, 4 << 20
_LINK_TIMEOUT_S = 20
ROUNDS = 3
"""Each node reduces with up to this many others: one would not tell whose fault a slow pair is."""


def matmul(*, gpus: int) -> list[dict[str, Any]]:
    """One entry for each device: its name and TFLOP/s, the best of a few tries, or `error`.

    bf16 on GPUs, fp32 on CPUs. The right factor is a permutation, so that the product is known exactly: a device that
    computes anything else is broken, however fast.
    """
    import torch

    if not gpus:
        return [_matmul(torch.device("cpu"), name="CPU", size=_CPU_SIZE, dtype=torch.float32)]
    found = []
    for index in range(gpus):
        try:
            device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
            found.append(_matmul(device, name=name, size=_GPU_SIZE, dtype=torch.bfloat16))
            torch.cuda.empty_cache()
        except Exception as error:
            found.append({"name": "GPU", "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    return found


def _matmul(device: torch.device, *, name: str, size: int, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    order = torch.randperm(size, device=device, generator=generator)
    right = torch.eye(size, device=device, dtype=dtype)[:, order]
    product = left @ right
    best_s = min(_seconds(lambda: torch.matmul(left, right, out=product), device) for _ in range(_REPEATS))
    if not torch.equal(product, left[:, order]):
        return {"name": name, "error": "a matrix product is wrong"}
    return {"name": name, "tflops": 2 * size**3 / best_s / 1e12}


def _seconds(work: Any, device: torch.device) -> float:
    import torch

    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def rounds(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pairs of nodes, round by round, so that no node is in two pairs of a round (the circle method)."""
    circle: list[int | None] = [*members, None] if len(members) % 2 else [*members]
    found = []
    for _ in range(min(ROUNDS, len(circle) - 1)):
        half = len(circle) // 2
        sides = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in sides if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def open_store(address: str, port: int, *, leads: bool) -> Any:
    """The store through which pairs find each other; port 0 lets the leader choose one."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=_LINK_TIMEOUT_S)
    return TCPStore(address, port, is_master=leads, wait_for_workers=False, timeout=timeout)


def links(store: Any, index: int, members: Sequence[int], *, gpus: int) -> list[dict[str, Any]]:
    """One entry for each pair of this node and device: `pair`, `device` and GB/s of an all-reduce, or `error`."""
    found = []
    for number, pairs in enumerate(rounds(members)):
        for pair in pairs:
            if index in pair:
                for device, measured in _pair(store, f"{number}.{pair[0]}.{pair[1]}", pair.index(index), gpus=gpus):
                    found.append({"pair": list(pair), "device": device, **measured})
    return found


def _pair(store: Any, key: str, rank: int, *, gpus: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import torch
    from torch import distributed

    timeout = timedelta(seconds=_LINK_TIMEOUT_S)
    try:
        prefixed = distributed.PrefixStore(key, store)
        if gpus:
            group: Any = distributed.ProcessGroupNCCL(prefixed, rank, 2, timeout)
        else:
            group = distributed.ProcessGroupGloo(prefixed, rank, 2, timeout)
    except Exception as error:
        yield 0, {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        return
    for index in range(max(1, gpus)):
        device = torch.device("cuda", index) if gpus else torch.device("cpu")
        try:
            yield index, {"gb_per_s": _reduce(group, device)}
        except Exception as error:
            yield index, {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            break
    with contextlib.suppress(Exception):
        group.shutdown()


def _reduce(group: Any, device: torch.device) -> float:
    """GB/s of the bytes that one node sends in an all-reduce of two: as many as the tensor has."""
    import torch

    size = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    tensor = torch.zeros(size // 4, device=device)

    def reduce() -> None:
        group.allreduce([tensor]).wait()

    reduce()
    return size / min(_seconds(reduce, device) for _ in range(_REPEATS)) / 1e9
