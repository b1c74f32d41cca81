"""A real vLLM on a GPU: inside the ranks with CUDA graphs and sleep, in a whole run, and as a server.

The reference of its log-probabilities is an engine on transformers in the same rank, with the same weights.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_runs import on_gpus, python_path, require_gpus, train_on
from rank_server import ONE_GPU, RankServer, place
from runs import MODELS, SHAPE, curve, generating, metrics, recipe, write_run
from test_colocated import _change, _error, _state, requests
from test_grpo_runs import grpo_recipe

from megabatch import Rollout
from megabatch.ledger.reader import Reader
from megabatch.rollout.vllm.engine_options import installed
from megabatch.slurm.ports import free_port_block

pytestmark = [
    pytest.mark.skipif(installed() != "vllm", reason="needs vLLM for GPUs: pip install 'megabatch[vllm]'"),
    pytest.mark.timeout(300),
]
TIMEOUT_S = 240
CACHE_BYTES = 8 << 30
"""Of keys and values: far more than all else that moves when an engine sleeps."""
SMALL_CACHE_BYTES = 1 << 28
NO_WARMUP = {"enable_jit_warmup": False}
EXACT, HALF = 1e-3, 0.5
"""Most that log-probabilities may differ by in float32 and in bfloat16."""
HALF_MEAN = 0.1
"""The same of their mean in bfloat16."""
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "kv_channels": 32}
LIFE = {
    "dense_fp32": ("qwen2", "float32", False),
    "dense_bf16": ("qwen3", "bfloat16", False),
    "experts_fp32": ("qwen3_moe", "float32", True),
    "experts_bf16": ("qwen3_moe", "bfloat16", False),
}
"""Model, dtype, and whether CUDA graphs are left out (`vllm_enforce_eager`)."""


def vllm(cache_bytes: int, **fields: Any) -> Rollout:
    """Kernels are compiled when they are used."""
    more = {"kv_cache_memory_bytes": cache_bytes, "max_num_batched_tokens": 256, "kernel_config": NO_WARMUP}
    made = {"vllm_mode": "colocate", "vllm_max_num_seqs": 8, "vllm_gpu_memory_utilization": 0.2, "sleep_level": 1,
            "max_completion_length": 8, "vllm_engine_kwargs": more}  # fmt: skip
    return Rollout(**{**made, **fields})


def over_its_life(run_dir: str) -> dict[str, Any]:
    """What the rank sees of its engine: three versions of the weights, between them both levels of sleep."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        with _graphs() as graphs:
            rollouts = open_rollouts(run, source, ranks)
            mine: Any = rollouts._mine
            engine = assemble.build_engine(run, ranks, train_iters=1)
            source.load(engine.model, ranks)
            found: dict[str, Any] = {"captured": graphs["capture_end"], "versions": [], "metrics": []}
            found["unready"] = _error(lambda: mine.generate(requests()))
            oracle = open_rollouts(replace(run, recipe=replace(run.recipe, rollout=Rollout())), source, ranks)
            puts, before = _held_during(mine, "put"), _everything_random()
            for version, level in ((1, 1), (2, 2), (3, 0)):
                _change(engine.model, version)
                metrics_of = rollouts.update(engine, version)
                found["metrics"].append({name: ratio.value for name, ratio in metrics_of.items()})
                oracle.update(engine, version)
                found["versions"].append(_drawn(rollouts, oracle, graphs))
                found[f"held_at_put_{version}"] = max(puts)
                puts.clear()
                awake = _held()
                rollouts.rest(level)
                if level:
                    found[f"freed_{level}"] = awake - _held()
                    found[f"asleep_{level}"] = _error(lambda: mine.generate(requests()))
                if level == 1:
                    mine.wake()
                    found["woken"] = [(one.ids, one.logps) for one in rollouts.generate(requests())]
                    found["held_again"] = _held() - awake
                    rollouts.rest(level)
                found["held_awake"] = awake
            found["recaptured"] = graphs["capture_end"] - found["captured"]
            found["is_kept"] = _everything_random() == before
            rollouts.close()
    return found


def _drawn(rollouts: Any, oracle: Any, graphs: dict[str, int]) -> dict[str, Any]:
    replayed = graphs["replay"]
    made, again = rollouts.generate(requests()), rollouts.generate(requests())
    replayed = graphs["replay"] - replayed
    plain = range(0, len(made), 2)  # drawn at temperature 1 from all tokens
    scores = oracle._mine.score([(requests()[number].prompt, made[number].ids) for number in plain])
    apart = [abs(a - b) for number, score in zip(plain, scores, strict=True)
             for a, b in zip(made[number].logps, score, strict=True)]  # fmt: skip
    return {
        "ids": [one.ids for one in made],
        "drawn": [(one.ids, one.logps) for one in made],
        "repeats": [one.ids for one in again] == [one.ids for one in made],
        "versions": sorted({version for one in made for version in one.versions}),
        "apart": max(apart),
        "apart_mean": sum(apart) / len(apart),
        "replayed": replayed,
    }


@contextmanager
def _graphs() -> Iterator[dict[str, int]]:
    """Counts of captures and replays of CUDA graphs."""
    counts = {"capture_end": 0, "replay": 0}
    kept = {name: getattr(torch.cuda.CUDAGraph, name) for name in counts}

    def counted(name: str) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return kept[name](self, *arguments, **keywords)

        return call

    for name in counts:
        setattr(torch.cuda.CUDAGraph, name, counted(name))
    try:
        yield counts
    finally:
        for name, method in kept.items():
            setattr(torch.cuda.CUDAGraph, name, method)


def _held() -> int:
    """Bytes of the devices that this process has; where the driver does not say, that all processes have."""
    if not torch.cuda.is_available():
        return 0
    from vllm.third_party import pynvml

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    pynvml.nvmlInit()
    devices = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    own = [one.usedGpuMemory for device in devices for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)
           if one.pid == os.getpid() and one.usedGpuMemory]  # fmt: skip
    free, total = torch.cuda.mem_get_info()
    return sum(own) or total - free


def _held_during(engine: Any, method: str) -> list[int]:
    """The same before each call of a method from now on."""
    call, found = getattr(engine, method), []

    def measured(*arguments: Any) -> Any:
        found.append(_held())
        return call(*arguments)

    setattr(engine, method, measured)
    return found


def _everything_random() -> list[Any]:
    on_device = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    return [*_state(), on_device, torch.get_default_dtype(), torch.get_float32_matmul_precision()]


def life(folder: Path, name: str) -> Path:
    model, dtype, eager = LIFE[name]
    shape = {**HEADS, "torch_dtype": dtype}
    made = on_gpus(recipe(folder, model, model=shape, data={"max_length": 56}, kernels={"transformer_impl": "local"}))
    rollout = vllm(CACHE_BYTES, vllm_enforce_eager=eager, offload_model=True, offload_optimizer=True)
    return write_run(generating(made, rollout), folder / "run")


@pytest.mark.parametrize("name", LIFE)
def test_an_engine_in_the_rank(name: str, gpus: RankServer, tmp_path: Path) -> None:
    run = life(tmp_path, name)
    [found] = gpus.run(over_its_life, world_size=1, timeout_s=TIMEOUT_S, run_dir=str(run))
    print({key: value for key, value in found.items() if key != "woken"})
    _check_life(found, exact=LIFE[name][1] == "float32")
    assert "the engine sleeps" in found["unready"], "it starts asleep"
    assert (found["captured"] > 0) is (not LIFE[name][2])
    for one in found["versions"]:
        assert (one["replayed"] > 0) is (not LIFE[name][2])
    assert found["recaptured"] == 0, "the graphs of the start compute with new weights"
    for level in (1, 2):
        assert found[f"freed_{level}"] > 0.9 * CACHE_BYTES
        assert "the engine sleeps" in found[f"asleep_{level}"]
    assert abs(found["held_again"]) < 0.1 * CACHE_BYTES
    for version in (2, 3):
        assert found[f"held_at_put_{version}"] < found["held_awake"] - 0.9 * CACHE_BYTES, "the cache wakes last"


def _check_life(found: dict[str, Any], *, exact: bool) -> None:
    for measured in found["metrics"]:
        assert 0 < measured["sync_max_logp_difference"] < (EXACT if exact else HALF)
        assert measured["sync_mean_logp_difference"] < (EXACT if exact else HALF_MEAN)
    for version, one in enumerate(found["versions"], start=1):
        assert one["versions"] == [version] and one["repeats"]
        assert one["apart"] < (EXACT if exact else HALF)
        assert one["apart_mean"] < (EXACT if exact else HALF_MEAN)
    first, second, third = (one["ids"] for one in found["versions"])
    assert first != second != third != first, "each version draws its own"
    assert [ids for ids, _ in found["woken"]] == first
    for (_, logps), (_, expected) in zip(found["woken"], found["versions"][0]["drawn"], strict=True):
        assert logps == pytest.approx(expected, abs=1e-6 if exact else 1e-2)
    assert found["is_kept"], "generators, threads and precisions are the trainer's own"


@pytest.mark.parametrize(("sleep_level", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_a_whole_run(sleep_level: int, dtype: str, gpus: RankServer, tmp_path: Path) -> None:
    """With the trainer in host memory while vLLM generates, it trains as it does with both on the device."""
    made = on_gpus(
        grpo_recipe(
            tmp_path,
            grpo={"steps_per_generation": 1},
            model={**MODELS["qwen3"], **HEADS, "torch_dtype": dtype},
            training={"train_iters": 3},
            evaluation={"eval_on_start": False, "eval_interval": 100},
            kernels={"transformer_impl": "local"},
        )
    )
    apart = vllm(
        SMALL_CACHE_BYTES, temperature=1.0, sleep_level=sleep_level, offload_model=True, offload_optimizer=True
    )
    beside = replace(apart, sleep_level=0, offload_model=False, offload_optimizer=False)
    runs = [
        train_on(gpus, write_run(replace(made, rollout=rollout), tmp_path / name))
        for name, rollout in (("apart", apart), ("beside", beside))
    ]
    for line in metrics(runs[0]):
        assert 0 < line["sync_max_logp_difference"] < (EXACT if dtype == "float32" else HALF)
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["staleness"] == 0
        assert line["generate_s"] > 0
    assert len(metrics(runs[0])) == 3
    print([(line["loss"], line["grad_norm"], line["sync_max_logp_difference"]) for line in metrics(runs[0])])
    drawn = [[(one.key, one.ids) for one in Reader(run / "ledger").records(1)] for run in runs]
    assert drawn[0] == drawn[1]
    assert curve(runs[0])[0] == pytest.approx(curve(runs[1])[0], rel=1e-3, abs=1e-5)


def through_the_server(run_dir: str) -> dict[str, Any]:
    """Weights to a server by a process group of NCCL, twice; what it draws, and what transformers make of it."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    run = RunConfig.load(Path(run_dir) / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        rollouts = open_rollouts(run, source, ranks)
        oracle = open_rollouts(replace(run, recipe=replace(run.recipe, rollout=Rollout())), source, ranks)
        found: dict[str, Any] = {"metrics": [], "versions": []}
        for version in (1, 2):
            _change(engine.model, version)
            found["metrics"].append({name: ratio.value for name, ratio in rollouts.update(engine, version).items()})
            oracle.update(engine, version)
            found["versions"].append(_drawn(rollouts, oracle, {"replay": 0}))
        members: Any = rollouts._mine
        found["group"] = type(members.members()[0]._group._group).__name__
        rollouts.close()
    return found


@contextmanager
def served(folder: Path, port: int, *, dtype: str) -> Iterator[None]:
    """`megabatch rollout` on the GPU of the rank, or on the next. Its log is in `folder`."""
    environment = {**os.environ, **python_path(), "HF_HUB_OFFLINE": "1"}
    if ONE_GPU:
        shared = place(1, 2, port, cuda=True)
        environment |= {name: value for name, value in shared.items() if name.startswith("NCCL_")}
    else:
        environment["CUDA_VISIBLE_DEVICES"] = "1"
    words = [
        sys.executable, "-m", "megabatch.cli", "rollout", str(folder), "--dtype", dtype, "--host", "127.0.0.1",
        "--port", str(port), "--max_model_len", "96", "--max_num_seqs", "8", "--gpu_memory_utilization", "0.2",
        "--kv-cache-memory-bytes", str(SMALL_CACHE_BYTES), "--kernel-config", json.dumps(NO_WARMUP),
    ]  # fmt: skip
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    except BaseException:
        print((folder / "server.log").read_text()[-6000:])
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_server_gets_weights_over_nccl(dtype: str, gpus: RankServer, tmp_path: Path) -> None:
    """Experts; vLLM's own CUDA graphs."""
    require_gpus(2)
    port = free_port_block()
    run, folder = serving(tmp_path, dtype, f"http://127.0.0.1:{port}")
    with served(folder, port, dtype=dtype):
        [found] = gpus.run(through_the_server, world_size=1, timeout_s=TIMEOUT_S, run_dir=str(run))
    print(found["metrics"])
    assert found["group"] == "ProcessGroupNCCL"
    exact = dtype == "float32"
    for version, (measured, one) in enumerate(zip(found["metrics"], found["versions"], strict=True), start=1):
        assert 0 < measured["sync_max_logp_difference"] < (EXACT if exact else HALF)
        assert one["versions"] == [version] and one["repeats"]
        assert one["apart"] < (EXACT if exact else HALF)
    assert found["versions"][0]["ids"] != found["versions"][1]["ids"]


def serving(folder: Path, dtype: str, url: str) -> tuple[Path, Path]:
    """A run whose model a server serves, and the server's folder."""
    import transformers

    from megabatch import Model, MoE
    from megabatch.data.tokens.tokenizer import train_bpe

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=SHAPE["padded_vocab_size"], hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=128, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, tie_word_embeddings=False,
        mlp_only_layers=[0], initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    model = folder / "model"
    transformers.Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(model)
    train_bpe(["a small text"], vocab_size=300, out_dir=model)
    made = on_gpus(recipe(folder, data={"max_length": 80}, kernels={"transformer_impl": "local"}))
    rollout = Rollout(vllm_mode="server", vllm_server_base_url=url, max_completion_length=16, vllm_server_timeout=150)
    made = replace(made, model=Model(model=str(model), torch_dtype=dtype), moe=MoE())
    return write_run(generating(made, rollout), folder / "run"), model
