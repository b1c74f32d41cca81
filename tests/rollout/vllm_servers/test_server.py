"""A real vLLM server on this machine's CPUs: weights, completions, log-probabilities, interruptions, a restart."""

from __future__ import annotations

import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.distributed as dist
from rank_server import RankServer
from vllm_python import NEEDS_VLLM
from vllm_server import (
    CPU,
    TOKEN,
    VOCAB,
    Running,
    buckets,
    difference,
    made,
    requests,
    start,
    update,
    worst_difference,
)

from megabatch import Model, MoE
from megabatch.config.grpo import Rollout
from megabatch.config.roles import Role
from megabatch.config.run import RunConfig
from megabatch.errors import RolloutError
from megabatch.rollout.ahead import Ahead
from megabatch.rollout.engine import Completion, Request, UnservedError
from megabatch.rollout.vllm.client import Client, UnreachableError
from megabatch.rollout.vllm.pool import Pool
from megabatch.rollout.vllm.server import Server
from megabatch.slurm.ports import free_port_block

pytestmark = NEEDS_VLLM


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


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LORA = {"tuner": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]}}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_etp2": {"parallel": {**TP2, "expert_tensor_parallel_size": 2}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "tp2_lora": {"parallel": TP2, **LORA},
    "ep2_lora": {"parallel": {"expert_model_parallel_size": 2}, **LORA},
}


def through_the_server(run_dirs: list[str], url: str) -> list[tuple[dict[str, float], list[Completion]]]:
    """For each run: metrics of an update by live shards, and completions, on each rank."""
    os.environ["MEGABATCH_ROLE_TOKEN"], os.environ["MEGABATCH_ROLE_ROLLOUT"] = TOKEN, url
    dist.init_process_group("gloo")
    found = [_through_the_server(Path(run_dir), by=1.1 + number / 100) for number, run_dir in enumerate(run_dirs)]
    dist.destroy_process_group()
    return found


def _through_the_server(run_dir: Path, *, by: float) -> tuple[dict[str, float], list[Completion]]:
    """Args: by: what weights are multiplied with, so that each run sends others."""
    from megabatch.config.run import RunConfig
    from megabatch.trainer import assemble
    from megabatch.trainer.model_source import model_source
    from megabatch.trainer.sync.open import open_rollouts

    run = RunConfig.load(run_dir / "run.json")
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        engine = assemble.build_engine(run, ranks, train_iters=1)
        source.load(engine.model, ranks)
        with torch.no_grad():
            for chunk in engine.model.chunks:
                for name, parameter in chunk.named_parameters():
                    if ".lora." in name:  # new ones change nothing
                        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                    parameter.mul_(by)
        rollouts = open_rollouts(run, source, ranks)
        rollouts._bucket_bytes = 20_000
        metrics = rollouts.update(engine, 1)
        completions = rollouts.generate(requests())
        rollouts.close()
    return {name: ratio.value for name, ratio in metrics.items()}, completions


def test_live_shards_reach_the_server(
    server: Server, running: Running, ranks_with_vllm: RankServer, tmp_path: Path
) -> None:
    """Experts and vocabulary split over two ranks, in buckets smaller than a layer; adapters merged. vLLM inside the
    ranks of the first of these runs, an engine in each, draws the same."""
    made_runs = []
    for layout, groups in LAYOUTS.items():
        recipe = replace(
            runs.recipe(tmp_path, resources={"tasks_per_node": 2}, data={"max_length": 80}, **groups),
            model=Model(model=str(running.folder), torch_dtype="float32"),
            moe=MoE(),
            roles=[Role(name="rollout", command=["python", "-m", "megabatch.cli", "rollout", "m"])],
        )
        recipe = runs.generating(recipe, Rollout(vllm_mode="server", max_completion_length=16))
        made_runs.append(str(runs.write_run(recipe, tmp_path / layout)))
    run = ranks_with_vllm.run
    found = run(through_the_server, world_size=2, run_dirs=made_runs, url=server.url)
    inside = run(through_the_server, world_size=2, run_dirs=[_inside(made_runs[0])], url=server.url)
    for layout, mine, others in zip(LAYOUTS, *found, strict=True):
        for metrics, completions in (mine, others):
            assert 0 < metrics["sync_max_logp_difference"] < 1e-4, layout
            assert completions == mine[1]
            assert [one.key for one in completions] == [request.key for request in requests()]
    for [(metrics, completions)] in inside:
        assert 0 < metrics["sync_max_logp_difference"] < 1e-4
        for one, served in zip(completions, found[0][0][1], strict=True):
            assert (one.key, one.ids) == (served.key, served.ids)
            assert one.logps == pytest.approx(served.logps, abs=1e-4)
    with pytest.raises(RolloutError, match=r"has the weights '.*:1', and was given 'test:\d'.* another run uses it"):
        server.generate(requests())


def _inside(run_dir: str) -> str:
    """The same run with vLLM inside its ranks."""
    run = RunConfig.load(Path(run_dir) / "run.json")
    rollout = Rollout(
        vllm_mode="colocate", vllm_enforce_eager=True, vllm_max_model_len=96, vllm_max_num_seqs=8,
        max_completion_length=16,
        vllm_engine_kwargs={"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 256},
    )  # fmt: skip
    folder = Path(f"{run_dir}-inside")
    folder.mkdir()
    replace(run, run_dir=str(folder), recipe=replace(run.recipe, roles=[], rollout=rollout)).save(folder / "run.json")
    return str(folder)


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


def long_and_short(name: str = "mixed") -> tuple[list[Request], list[Request]]:
    """Two requests of 80 tokens and two of 4; two and two are served at a time."""
    some = [replace(one, key=f"{name}/{n}") for n, one in enumerate(requests(4))]
    tokens = (80, 4, 80, 4)
    some = [
        replace(one, sampling=replace(one.sampling, max_tokens=count)) for one, count in zip(some, tokens, strict=True)
    ]
    return some[::2], some[1::2]


def test_completions_that_an_update_interrupts_go_on_with_the_new_weights(server: Server) -> None:
    """Each token has the log-probability of the model of its version, given all tokens before it."""
    pool, models = Pool([server]), {7: made(seed=7), 8: made(seed=8)}
    update(pool, models[7], 7)
    ahead = Ahead(pool.stream)
    # the server may be done with the long ones before it is held: then they are asked for once more
    for attempt in range(20):
        long, short = long_and_short(f"mixed{attempt}")
        ahead.begin([*long, *short])
        ahead.go_on()
        taken = ahead.take([request.key for request in short])
        ahead.hold()
        assert ahead.unfinished + ahead.landed == 2
        if ahead.unfinished:
            break
        ahead.take([request.key for request in long])
    for request, one in zip(short, taken, strict=True):
        assert set(one.versions) == {7} and difference(request, one, models) < 1e-4
    assert ahead.unfinished > 0
    update(pool, models[8], 8)
    ahead.go_on()
    found = ahead.take([request.key for request in long])
    for request, one in zip(long, found, strict=True):
        assert len(one.ids) == 80 and list(one.versions) == sorted(one.versions)
        assert difference(request, one, models) < 1e-4
    assert any(set(one.versions) == {7, 8} for one in found)
    assert (ahead.unfinished, ahead.landed) == (0, 0)


def test_a_trainer_that_died_in_an_update_leaves_a_server_that_takes_the_next(running: Running) -> None:
    """It stays paused, in the middle of an update, with the group of a dead process."""
    dead = running.server()
    dead.begin_update(1)
    dead.put(next(buckets(made(seed=9))))
    assert dead._group is not None
    dead._group.close()
    requeued = Server(dead.client, owner="requeued", device=CPU, timeout_s=600, concurrency=4)
    model = made(seed=9)
    update(requeued, model, 1)
    assert worst_difference(requeued, model, 1) < 1e-4


def test_a_server_that_lost_the_weights_gets_them_before_it_is_used(server: Server) -> None:
    """One that started again is one with the version `default`."""
    absent = Server(Client(f"http://127.0.0.1:{free_port_block()}"), owner="test", device=CPU, timeout_s=0.1)
    pool = Pool([absent, server])
    model = made(seed=3)
    update(pool, model, 3)
    assert [one.url for one in pool.members()] == [server.url]  # type: ignore[attr-defined]
    before = pool.generate(requests())
    server.client.post("/update_weight_version", {"new_version": "default"})
    with pytest.raises(UnservedError, match="requests that were not served: 6"):
        pool.generate(requests())
    update(pool, model, 4)
    assert [one.ids for one in pool.generate(requests())] == [one.ids for one in before]


def test_two_servers_share_the_work_and_one_may_die_and_start_again(running: Running) -> None:
    """Last of this folder: it ends the server."""
    second = start(running.folder, free_port_block())
    servers = [running.server(), second.server()]
    pool, model = Pool(servers), made(seed=4)
    try:
        update(pool, model, 1)
        assert len(pool.members()) == 2
        ahead = Ahead(pool.stream)
        long, short = long_and_short()
        some = [replace(one, key=f"{copy}/{one.key}") for copy in range(4) for one in (*long, *short)]
        ahead.begin(some)
        ahead.go_on()
        ahead.take([some[3].key])
        running.stop()
        # it may have made all of its share already: some of these are asked of it in any case
        more = [replace(long[0], key=f"more/{n}") for n in range(8)]
        ahead.begin(more)
        ahead.go_on()
        rest = [*(one for one in some if one is not some[3]), *more]
        for request, one in zip(rest, ahead.take([one.key for one in rest]), strict=True):
            assert len(one.ids) == request.sampling.max_tokens and difference(request, one, {1: model}) < 1e-4
        ahead.hold()
        assert [one.url for one in pool.members()] == [second.server().url]  # type: ignore[attr-defined]
        second.stop()
        ahead.begin([replace(long[0], key="lost")])
        ahead.go_on()
        with pytest.raises(UnservedError, match="requests that were not served: 1"):
            ahead.take(["lost"])
        ahead.hold()
        second = start(second.folder, second.port)
        servers[0]._timeout_s = 0.1  # it stays dead
        update(pool, model, 2)
        ahead.go_on()
        (one,) = ahead.take(["lost"])
        assert set(one.versions) == {2} and difference(long[0], one, {2: model}) < 1e-4
        assert [one.url for one in pool.members()] == [servers[1].url]  # type: ignore[attr-defined]
        pool.begin_update(3)
        coming = buckets(model)
        pool.put(next(coming))
        second.stop()
        with pytest.raises(UnreachableError, match="left while weights were sent"):
            for bucket in coming:
                pool.put(bucket)
        pool.abort_update()
        assert pool.members() == []
    finally:
        second.stop()
        pool.close()
