"""A reference and a teacher of GRPO behind real vLLM servers, against the same run with both in the ranks."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import runs
import torch
from rank_server import RankServer
from vllm_python import NEEDS_VLLM, python
from vllm_server import TOKEN, Running, start

from megabatch import Grpo, Model, MoE, Recipe, Rlhf, Rollout
from megabatch.config.run import RunConfig
from megabatch.errors import RolloutError
from megabatch.ledger.reader import Reader
from megabatch.rollout.vllm.client import Client, UnreachableError
from megabatch.rollout.vllm.scoring import ScoringServer, ScoringServers, Wanted
from megabatch.slurm.ports import free_port_block
from megabatch.trainer import replay

pytestmark = NEEDS_VLLM
REWARD = """
def letters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]
"""
GAME = """
class Game:
    def reset(self, messages, **columns):
        self.turn = 0
    def step(self, completion):
        self.turn += 1
        return f"turn {self.turn}", 0.0, self.turn == 2
"""
KEY = "SERVERS_KEY"
TEXTS = [([5, 6, 7], [8, 9, 10, 11]), ([3], [4]), ([20] * 9, []), ([7, 7, 9], [250] * 20)]


def made(seed: int) -> Any:
    """A dense model as vLLM's CPU kernels take it, which ends a turn after a few tokens more often than not."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=304, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
        initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[2] *= 6
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the policy's model, another, and what a run needs besides."""
    from megabatch.data.tokens.tokenizer import train_bpe

    found = tmp_path_factory.mktemp("scored")
    for name, seed in (("policy", 1), ("other", 2)):
        made(seed).save_pretrained(found / name)
        train_bpe(["a small text"], vocab_size=300, out_dir=found / name)
    (found / "reward.py").write_text(REWARD)
    (found / "game.py").write_text(GAME)
    return found


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[tuple[Running, Running]]:
    """Servers with the other model, which start beside each other: of `megabatch rollout`, and vLLM's own."""
    port = free_port_block()
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "other"), "--dtype", "float32",
             "--enforce-eager", "--max-model-len", "96", "--max-num-seqs", "8", "--port", str(port), "--host",
             "127.0.0.1", "--kv-cache-memory-bytes", str(16 << 20)]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    with open(folder / "plain.log", "ab") as log:
        process = subprocess.Popen(
            [python() or "", *words], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    found = start(folder / "other", free_port_block()), Running(folder / "other", port, process)
    try:
        yield found
    finally:
        for one in found:
            one.stop()


@pytest.fixture(scope="module")
def ours(both: tuple[Running, Running]) -> Running:
    return both[0]


@pytest.fixture(scope="module")
def plain(both: tuple[Running, Running]) -> Running:
    return both[1]


def asked(server: Running, *, temperature: float = 1.0, longest: int = 90, timeout_s: float = 900) -> ScoringServer:
    client = Client(f"http://127.0.0.1:{server.port}", token=TOKEN, timeout_s=timeout_s)
    wanted = Wanted(vocab_size=304, longest=longest, temperature=temperature)
    return ScoringServer(client, f"rlhf.ref_model_server={client.url}", wanted, timeout_s=timeout_s)


def probes(folder: Path) -> dict[str, list[int]]:
    from megabatch.data.tokens import tokenizer

    text = "some text of 12 words"
    return {text: tokenizer.load(folder / "other").encode(text, add_special_tokens=False)}


def expected(model: Any, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0]


def test_servers_score_at_the_temperature_of_each_request(ours: Running, folder: Path) -> None:
    """Also of requests that vLLM computes together."""
    model, temperatures = made(2), (1.0, 0.7, 1.4)
    servers = [ScoringServers([asked(ours, temperature=temperature)], each=4) for temperature in temperatures]
    assert [one.open(probes(folder)) for one in servers] == [95] * 3
    coming = [one.begin_logps(TEXTS * 3) for one in servers]
    for temperature, found in zip(temperatures, coming, strict=True):
        for (prompt, ids), logps in zip(TEXTS * 3, found.result(), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(logps), expected(model, prompt, ids, temperature), atol=1e-4, rtol=0
            )
    for one in servers:
        one.close()


def test_a_server_that_cannot_do_what_the_run_needs_is_refused(plain: Running, folder: Path) -> None:
    assert asked(plain).open(probes(folder)) == 95
    with pytest.raises(
        RolloutError, match=r"of temperature 1, whatever .* rollout.temperature=0.9; start it with `megabatch rollout`"
    ):
        asked(plain, temperature=0.9).open(probes(folder))
    with pytest.raises(RolloutError, match=r"takes 96 tokens, and must take one more than the run's longest"):
        asked(plain, longest=96).open(probes(folder))
    with pytest.raises(RolloutError, match="has another tokenizer than the trained model: 'some text"):
        asked(plain).open({text: ids[1:] for text, ids in probes(folder).items()})


def recipe(
    folder: Path,
    *,
    steps: int = 4,
    ranks: int = 2,
    parallel: Mapping[str, Any] = MappingProxyType({}),
    rlhf: Mapping[str, Any] = MappingProxyType({}),
    gkd: Mapping[str, Any] = MappingProxyType({}),
    grpo: Mapping[str, Any] = MappingProxyType({}),
    rollout: Mapping[str, Any] = MappingProxyType({}),
    **groups: Any,
) -> Recipe:
    """Two steps on each round; the policy has a gentle rate, so that rounding does not change what it draws."""
    base = runs.recipe(
        folder,
        parallel=dict(parallel),
        resources={"tasks_per_node": ranks},
        training={"train_iters": steps, "seed": 3},
        data={"max_length": 64},
        checkpoint={"save_interval": 1},
        evaluation={"eval_iters": 0},
        learning_rate={"lr": 1e-4},
        **{"batch": {"micro_batch_size": 1}, **groups},
    )
    return replace(
        base,
        task="rlhf",
        model=Model(model=str(folder / "policy"), torch_dtype="float32"),
        moe=MoE(),
        rlhf=Rlhf(rlhf_type="grpo", **rlhf),
        grpo=Grpo(
            **{
                "reward_funcs": [f"{folder / 'reward.py'}:letters"],
                "num_generations": 4,
                "beta": 0.5,
                "steps_per_generation": 2,
                **grpo,
            }
        ),
        gkd=replace(base.gkd, **gkd),
        rollout=Rollout(**{"temperature": 0.8, "max_completion_length": 20, **rollout}),
    )


def behind(server: Running, **more: Any) -> dict[str, Any]:
    return {"ref_model_server": f"http://127.0.0.1:{server.port}", "ref_api_key_variable": KEY, **more}


def trained(run_dir: str, stop_before: int | None = None, end: int | None = None) -> tuple[Any, list[str]]:
    """Trains one rank: its exit code or its error, and what it logs of the reference.

    Args: stop_before: the step in which it dies; end: the process that it ends in its first step.
    """
    from megabatch.trainer.engine import Engine

    os.environ[KEY] = TOKEN
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megabatch").addHandler(handler)
    logging.getLogger("megabatch").setLevel(logging.INFO)
    step, calls = Engine.step, 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_before:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == 1 and end is not None and os.environ["RANK"] == "0":
            os.killpg(end, signal.SIGKILL)
        return step(*arguments, **keywords)

    Engine.step = counted  # type: ignore[method-assign, assignment]
    try:
        code: Any = runs.train(run_dir)
    except RolloutError as e:
        code = str(e)
    return code, [line for line in said if "reference" in line]


def run_of(ranks: RankServer, wanted: Recipe, run_dir: Path, **how: Any) -> Path:
    run, world_size = runs.write_run(wanted, run_dir), wanted.resources.world_size
    found = ranks.run(trained, world_size=world_size, run_dir=str(run), **how)
    assert [code for code, _ in found] == [0] * world_size, found
    return run


def compared(run: Path, other: Path) -> None:
    """Losses and metrics of two runs on the same completions, and what their ledgers have of each token."""
    for mine, its in zip(runs.metrics(run), runs.metrics(other), strict=True):
        for name in ("loss", "kl", "teacher_kl", "reward", "ratio", "completion_length"):
            if name in mine or name in its:
                assert mine[name] == pytest.approx(its[name], rel=1e-4, abs=1e-5), (mine["step"], name)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-3)
    assert len(runs.metrics(run)) == 4
    for step in (1, 2, 3, 4):
        for mine, its in zip(*(Reader(one / "ledger").records(step) for one in (run, other)), strict=True):
            assert (mine.key, mine.ids) == (its.key, its.ids)
            beforehand = [] if step in (1, 3) else ["old"]  # the first step of a round gives its own
            assert list(mine.columns) == list(its.columns) == [*beforehand, "reference", "teacher"]
            for column in mine.columns:
                assert mine.columns[column] == pytest.approx(its.columns[column], abs=1e-4)


FOUR_RANKS: dict[str, dict[str, Any]] = {
    "dp-cp": {"parallel": {"context_parallel_size": 2}},
    "tp-pp": {
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        "batch": {"micro_batch_size": 2},
    },
}


def test_a_run_is_the_same_with_its_models_behind_servers(ranks: RankServer, ours: Running, folder: Path) -> None:
    """A reference and a teacher, in the ranks and behind a server, whatever the layout of the four that ask."""
    other = str(folder / "other")
    inside = recipe(folder, ranks=1, gkd={"teacher_model": other}, bridge={"ref_model": other})
    expected = run_of(ranks, inside, folder / "ranks")
    teacher = {"teacher_model_server": f"http://127.0.0.1:{ours.port}", "teacher_api_key_variable": KEY}
    for layout, groups in FOUR_RANKS.items():
        outside = recipe(folder, ranks=4, gkd=teacher, rlhf=behind(ours), **groups)
        found = run_of(ranks, outside, folder / layout)
        compared(found, expected)
    assert min(line["kl"] for line in runs.metrics(found)) > 0.1, "the reference is another model than the policy"
    assert all(line["reference_s"] >= 0 for line in runs.metrics(found) if line["step"] in (1, 3))


def replayed(run_dir: str, step: int) -> dict[str, float | None]:
    run = RunConfig.load(Path(run_dir) / "run.json")
    result = replay.replayed(run, replay.in_one_process(run, gpus=0), step)
    return {name: ratio.value for name, ratio in result.metrics.items()}


def test_a_round_goes_on_and_is_replayed_without_the_server(ranks: RankServer, plain: Running, folder: Path) -> None:
    """Killed within a round, and in the next attempt the server has gone: what it said is in the round's file."""
    one = recipe(folder, steps=2, rlhf=behind(plain), rollout={"temperature": 1.0})
    calm = run_of(ranks, one, folder / "calm")
    run = runs.write_run(one, folder / "killed")
    with pytest.raises(RuntimeError, match="killed: hung or crashed"):
        ranks.run(trained, world_size=2, run_dir=str(run), stop_before=2)
    assert [path.name for path in (run / "rounds").iterdir()] == ["round_00000000.npz"]
    assert len(runs.curve(run)) == 1
    run_of(ranks, one, run)
    assert {line[0]: line for line in runs.curve(run)} == {line[0]: line for line in runs.curve(calm)}
    for step in (1, 2):
        assert [(one.key, one.columns) for one in Reader(run / "ledger").records(step)] == [
            (one.key, one.columns) for one in Reader(calm / "ledger").records(step)
        ]
        (again,) = ranks.run(replayed, world_size=1, run_dir=str(run), step=step)
        logged = next(line for line in runs.metrics(run) if line["step"] == step)
        assert again["kl"] == pytest.approx(logged["kl"], rel=1e-4)
        assert again["loss"] == pytest.approx(logged["loss"], rel=1e-4, abs=1e-6)


def test_the_first_round_tells_whether_the_reference_is_the_policys_start(
    ranks: RankServer, ours: Running, folder: Path
) -> None:
    """By the completions' own log-probabilities where no pass computes old ones; with LoRA, several turns, and rows
    that share prompts."""
    turns = {"gym_env": f"{folder / 'game.py'}:Game", "max_turns": 2, "max_completion_length": 8}
    wanted = recipe(
        folder, steps=1, ranks=1, rlhf=behind(ours), grpo={"steps_per_generation": 1, "beta": 0.1}, rollout=turns,
        batch={"micro_batch_size": 2}, tuner={"tuner_type": "lora"},
    )  # fmt: skip
    found = []
    for name in ("policy", "other"):
        own = replace(wanted, model=replace(wanted.model, model=str(folder / name)))
        run = runs.write_run(own, folder / f"start-{name}")
        ((code, said),) = ranks.run(trained, world_size=1, run_dir=str(run))
        assert code == 0
        (line,) = [one for one in said if "of the first round differ from" in one]
        found.append(float(line.partition("by up to ")[2].partition(" ")[0]))
        records = Reader(run / "ledger").records(1)
        assert any(0 in one.mask for one in records) and all(
            len(one.columns["reference"]) == len(one.ids) for one in records
        )
    assert found[0] > 0.1 and found[1] < 1e-4


def test_requests_of_a_server_that_dies_go_to_the_others(ours: Running, plain: Running, folder: Path) -> None:
    both = ScoringServers([asked(plain, timeout_s=20), asked(ours, timeout_s=120)], each=2)
    both.open(probes(folder))
    model, texts = made(2), TEXTS * 40
    coming = both.begin_logps(texts)
    plain.stop()
    for (prompt, ids), logps in zip(texts, coming.result(), strict=True):
        torch.testing.assert_close(torch.from_numpy(logps), expected(model, prompt, ids, 1.0), atol=1e-4, rtol=0)
    again = both.begin_logps(TEXTS)
    assert len(again.result()) == len(TEXTS)
    both.close()
    alone = ScoringServers([asked(plain, timeout_s=1)], each=2)
    with pytest.raises(UnreachableError, match=r"ref_model_server=http://127.0.0.1:\d+ did not answer for 1 s"):
        alone.begin_logps(TEXTS).result()
    alone.close()


def test_a_run_whose_only_server_dies_says_so_on_every_rank(ranks: RankServer, ours: Running, folder: Path) -> None:
    wanted = recipe(folder, rlhf=behind(ours, ref_server_timeout=20.0))
    run = runs.write_run(wanted, folder / "dead")
    found = ranks.run(trained, world_size=2, run_dir=str(run), end=ours.process.pid)
    for code, _ in found:
        assert "rlhf.ref_model_server=http://127.0.0.1:" in code and "did not answer for 20 s, at last:" in code
    assert [line["step"] for line in runs.metrics(run)] == [1, 2], "the round that was there is trained on"
