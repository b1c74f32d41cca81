"""A teacher behind a real vLLM server: what it tells, whom it refuses, and a student that learns from it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from rank_server import RankServer
from vllm_python import NEEDS_VLLM
from vllm_server import TOKEN, VOCAB, Running, made, update

from megabatch.errors import RolloutError
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.scoring import ScoringServer, Wanted
from megabatch.rollout.vllm.server import Server
from megabatch.slurm.ports import free_port_block

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def giver(running: Running) -> Iterator[Server]:
    """Gives the server weights; its own, so that tests of other files find theirs as they left it."""
    running.revive()
    found = running.server()
    found.wait()
    yield found
    found.close()


def teacher(
    running: Running, *, count: int = 5, vocab_size: int = VOCAB, token: str = TOKEN, longest: int = 95
) -> ScoringServer:
    client = Client(f"http://127.0.0.1:{running.port}", token=token, timeout_s=60)
    wanted = Wanted(vocab_size=vocab_size, longest=longest, likeliest=count)
    return ScoringServer(client, "gkd.teacher_model_server=here", wanted, timeout_s=60)


def probes(folder: Path) -> dict[str, list[int]]:
    from megabatch.data.tokens import tokenizer

    text = "some text of 12 words"
    return {text: tokenizer.load(folder).encode(text, add_special_tokens=False)}


def test_a_teacher_tells_its_likeliest_tokens(giver: Server, running: Running) -> None:
    model = made(seed=2)
    update(giver, model, 7)
    asked = teacher(running)
    assert asked.open(probes(running.folder)) == 95
    for ids in [(5, 6, 7, 8), (9, 3)]:
        ids_nK, logps_nK = asked.likeliest(ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).topk(5)
        assert ids_nK[:-1].tolist() == expected.indices.tolist()
        torch.testing.assert_close(torch.from_numpy(logps_nK[:-1]), expected.values, atol=1e-4, rtol=0)
        assert not ids_nK[-1].any() and not logps_nK[-1].any()


def test_a_teacher_that_does_not_fit_is_refused(giver: Server, running: Running) -> None:
    known = probes(running.folder)
    with pytest.raises(
        RolloutError, match=r"policy has another tokenizer than the trained model: 'some text of 12 words' is"
    ):
        teacher(running).open({text: ids[1:] for text, ids in known.items()})
    with pytest.raises(RolloutError, match=r"takes 96 tokens, .* sequence of 96; start it with --max-model-len 97"):
        teacher(running, longest=96).open(known)
    with pytest.raises(RolloutError, match=r"answered 400: .*21"):
        teacher(running, count=21).open(known)
    with pytest.raises(
        RolloutError, match=r"names 5 tokens up to \d+, and needs gkd_logits_topk=5 of the student's 1"
    ):
        teacher(running, vocab_size=1).likeliest((5, 6))
    with pytest.raises(RolloutError, match="answered 401"):
        teacher(running, token="another").open(known)
    client, wanted = Client(f"http://127.0.0.1:{free_port_block()}", timeout_s=1), Wanted(vocab_size=1, longest=1)
    with pytest.raises(RolloutError, match=r"role:judge \(there\) did not answer for 0.1 s, at last: http"):
        ScoringServer(client, "role:judge (there)", wanted, timeout_s=0.1).open(known)


def distilled(run_dir: str) -> int:
    """Trains one rank."""
    os.environ["TEACHERS_KEY"] = TOKEN
    return runs.train(run_dir)


def test_a_student_learns_the_same_from_a_server(
    giver: Server, running: Running, ranks: RankServer, tmp_path: Path
) -> None:
    model = made(seed=2)
    update(giver, model, 8)
    shutil.copytree(running.folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("server.log"))
    model.save_pretrained(tmp_path / "teacher")
    ways: dict[str, dict[str, Any]] = {
        "ranks": {"teacher_model": str(tmp_path / "teacher")},
        "server": {"teacher_model_server": giver.url, "teacher_api_key_variable": "TEACHERS_KEY"},
        "tagged": {
            "teacher_model_server": json.dumps([{"url": giver.url, "tags": ["train.jsonl", "validation.jsonl"]}]),
            "teacher_api_key_variable": "TEACHERS_KEY",
        },
    }
    for name, way in ways.items():
        recipe = runs.recipe(
            tmp_path,
            parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True},
            resources={"tasks_per_node": 2},
            data={"max_length": 80},
            training={"train_iters": 2},
            batch={"global_batch_size": 4, "micro_batch_size": 2},
            evaluation={"eval_on_start": False, "eval_iters": 0},
            model={"tokenizer": str(running.folder)},
            rlhf={"rlhf_type": "gkd"},
            gkd={"gkd_logits_topk": 5, "lmbda": 0.0, **way},
        )
        run = runs.write_run(replace(recipe, task="rlhf"), tmp_path / name)
        assert ranks.run(distilled, world_size=2, run_dir=str(run)) == [0, 0]
    for found, expected in zip(runs.curve(tmp_path / "server"), runs.curve(tmp_path / "ranks"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    assert runs.curve(tmp_path / "tagged") == runs.curve(tmp_path / "server")
