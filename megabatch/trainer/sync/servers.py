"""vLLM's servers of a run: reached, and compared with the run's model before any weight is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megabatch.errors import RolloutError
from megabatch.plan.shape import ModelShape
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.engine_options import WANTED
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import Server


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a run needs of its servers."""

    shape: ModelShape
    dtype: str
    longest: int
    """Most tokens of a prompt and its completion."""
    owner: str
    """Names this attempt of the run to the servers."""
    device: torch.device
    token: str | None
    timeout_s: float
    group_port: int | None
    """None for a free one."""
    lora_rank: int | None = None
    """Of the adapter that servers get alone; None where they get whole weights."""
    lora_layers: Sequence[str] = ()
    """Last parts of the names of the layers that it has."""


def open_pool(urls: Sequence[str], wanted: Wanted) -> tuple[Pool, int]:
    """The servers, and how many tokens all of them take.

    Raises: RolloutError naming everything that does not fit, for a server that does not answer or has another model.
    """
    servers = [_opened(url, wanted) for url in urls]
    limits = []
    for server in servers:
        server.wait()
        facts = server.facts()
        if faults := unfit(facts, wanted):
            raise RolloutError(f"{server.url} does not fit this run: {'; '.join(faults)}")
        limits.append(int(facts["max_model_len"]))
    return Pool(servers), min(limits)


def _opened(url: str, wanted: Wanted) -> Server:
    client = Client(url, token=wanted.token, timeout_s=wanted.timeout_s)
    return Server(
        client,
        owner=wanted.owner,
        device=wanted.device,
        group_port=wanted.group_port,
        timeout_s=wanted.timeout_s,
    )


def unfit(facts: Mapping[str, Any], wanted: Wanted) -> list[str]:
    """Each difference between a server (`Server.facts`) and what a run needs."""
    shape = wanted.shape
    expected = {
        "model_type": shape.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "dtype": wanted.dtype,
    }
    faults = [
        f"it has {name}={facts[name]!r}, the run {value!r}" for name, value in expected.items() if facts[name] != value
    ]
    if not str(facts["vllm"]).startswith(f"{WANTED}."):
        faults.append(f"it runs vLLM {facts['vllm']}, megabatch needs {WANTED}")
    if facts["max_model_len"] < wanted.longest:
        faults.append(
            f"it takes max_model_len={facts['max_model_len']} tokens, the run needs data.max_length + "
            f"rollout.max_completion_length = {wanted.longest}"
        )
    return [*faults, *_unfit_for_adapters(facts, wanted)]


def _unfit_for_adapters(facts: Mapping[str, Any], wanted: Wanted) -> list[str]:
    if wanted.lora_rank is None:
        return []
    start = f"start it with --lora_rank {wanted.lora_rank} --lora_layers {','.join(wanted.lora_layers)}"
    if facts["lora_rank"] is None:
        return [f"it takes no adapters, and the run has rollout.vllm_enable_lora=True; {start}"]
    faults = []
    if facts["lora_rank"] < wanted.lora_rank:
        faults.append(f"it takes adapters of rank {facts['lora_rank']}, the run's is {wanted.lora_rank}; {start}")
    if missing := sorted(set(wanted.lora_layers) - set(facts["lora_layers"])):
        faults.append(f"it does not adapt {', '.join(missing)}; {start}")
    return faults
