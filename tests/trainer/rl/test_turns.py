"""GRPO over conversations of several turns: what is trained on, and what the ledger has of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

from megabatch import Grpo, Rlhf, Rollout
from megabatch.ledger.reader import Reader

ENVIRONMENT = """
class Echo:
    def reset(self, messages, solution, **columns):
        assert messages[-1]["role"] == "user" and solution.startswith("It is")
        self.turn = 0
    def step(self, completion):
        self.turn += 1
        return f"go on <|im_end|> {self.turn}", float(len(set(completion))), self.turn == 2

def turns_seen(completions, turns, environment_reward, **columns):
    assert all(mine[-1] == text for mine, text in zip(turns, completions))
    return [float(len(mine)) for mine in turns]
"""


@pytest.fixture(scope="module")
def run(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    file = folder / "echo.py"
    file.write_text(ENVIRONMENT)
    made = recipe(
        folder,
        "qwen2",
        batch={"micro_batch_size": 1, "global_batch_size": 8},
        data={"max_length": 64},
        evaluation={"eval_iters": 0},
        training={"train_iters": 2},
        resources={"tasks_per_node": 2},
        checkpoint={"no_save_optim": True},
    )
    made = replace(
        made,
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(
            reward_funcs=(f"{file}:turns_seen",), reward_weights=(0.0, 1.0), num_generations=4, beta=0.1,
            rollout_importance_sampling_mode="token_truncate",
        ),
        rollout=Rollout(
            temperature=1.0, max_completion_length=60, gym_env=f"{file}:Echo", use_gym_env=True, max_turns=3
        ),
    )  # fmt: skip
    folder = write_run(made, folder / "run")
    assert set(ranks.run(train, world_size=2, run_dir=str(folder))) == {0}
    return folder


def test_the_environments_reward_is_one_of_the_rewards(run: Path) -> None:
    for line in metrics(run):
        assert line["reward_sum"] == pytest.approx(line["reward_environment_sum"])
        assert 1 <= line["reward_turns_seen"] <= 2
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
        assert line["rollout_max_difference"] < 1e-3, "engine and trainer have the same contexts in every turn"


def test_only_the_models_tokens_are_learned(run: Path) -> None:
    reader = Reader(run / "ledger")
    several = 0
    for step in reader.steps:
        for record in reader.records(step):
            environments = [index for index, part in enumerate(record.mask) if not part]
            several += bool(environments)
            assert all(record.logps[index] == 0 for index in environments)
            assert len(record.mask) == len(record.ids) == len(record.versions)
            assert record.rewards["turns_seen"] == (2 if environments else 1)
    assert several, "some conversations have two turns"
