"""Whole GRPO runs of a tiny model that generates with transformers: metrics, rounds, resuming."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rank_server import RankServer
from runs import SHAPE, curve, metrics, recipe, train, write_run

from megabatch import Grpo, Rlhf, Rollout
from megabatch.config.run import RunConfig
from megabatch.data.tokens.tokenizer import train_bpe
from megabatch.errors import DataError
from megabatch.ledger.reader import Reader
from megabatch.trainer.rl.prompts import rows_of

REWARDS = """
def letters(completions, **columns):
    return [len(set(text)) / 10 for text in completions]

def known(completions, solution, tag, **columns):
    assert all(answer.startswith("It is") for answer in solution) and set(tag) == {"made"}
    return [None if len(text) % 3 == 0 else float(len(text) > 12) for text in completions]

def nothing(completions, **columns):
    return [None] * len(completions)

def tagged(row):
    return {**row, "tag": "made"}

def twice(row):
    return [row, row]
"""
SETTINGS: dict[str, Any] = {"num_generations": 4, "steps_per_generation": 2, "beta": 0.1, "num_generations_eval": 2}


def grpo_recipe(folder: Path, *, world_size: int = 1, grpo: dict[str, Any] | None = None, **groups: Any) -> Any:
    file = folder / "reward.py"
    file.write_text(REWARDS)
    given = {"batch": {"micro_batch_size": 1, "global_batch_size": 8}, "resources": {"tasks_per_node": world_size}}
    made = recipe(
        folder,
        "qwen2",
        **{
            **given,
            "data": {"max_length": 64, "preprocess": f"{file}:tagged"},
            "evaluation": {"eval_interval": 4},
            **groups,
        },
    )
    rewards = {"reward_funcs": (f"{file}:letters", f"{file}:known"), "reward_weights": (1.0, 0.5)}
    return replace(
        made,
        task="rlhf",
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(**{**SETTINGS, **rewards, **(grpo or {})}),
        rollout=Rollout(temperature=1.0, max_completion_length=8),
    )


def test_a_prompt_has_one_row(tmp_path: Path) -> None:
    made = grpo_recipe(tmp_path, data={"max_length": 64, "preprocess": f"{tmp_path / 'reward.py'}:twice"})
    run = RunConfig.load(write_run(made, tmp_path / "run") / "run.json")
    with pytest.raises(
        DataError, match=r":1: data.preprocess made 2 rows of it; with rlhf_type='grpo' it may make one"
    ):
        rows_of(run, run.recipe.data.dataset)


def run_of(ranks: RankServer, folder: Path, name: str, *, world_size: int = 1, **how: Any) -> Path:
    run = write_run(grpo_recipe(folder, world_size=world_size, **how), folder / name)
    assert set(ranks.run(train, world_size=world_size, run_dir=str(run))) == {0}
    return run


@pytest.fixture(scope="module")
def alone(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(ranks, tmp_path_factory.mktemp("grpo-runs"), "alone", checkpoint={"no_save_optim": True})


def test_every_step_says_what_its_completions_are_worth(alone: Path) -> None:
    lines = metrics(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        known, letters = line["reward_known"], line["reward_letters"]
        assert line["reward_letters_count"] == 8 and line["reward_known_count"] < 8, "some have no such reward"
        assert 0 < letters < 1.5 and 0 <= known <= 1 and line["completion_length"] <= 8
        assert line["grad_norm"] > 0 and math.isfinite(line["loss"]) and line["kl"] >= 0
        assert line["samples"] == 8
    assert [line["staleness"] for line in lines] == [0, 1, 0, 1]
    assert [line["ratio"] == pytest.approx(1, abs=1e-5) for line in lines] == [True, False, True, False]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[3]["kl"] > 0
    assert lines[0]["generate_s"] > 0 and "generate_s" not in lines[1]
    assert lines[2]["sync_max_logp_difference"] < 1e-4, "the first round has the weights of the first evaluation"


def test_the_ledger_has_what_each_step_was_trained_on(alone: Path) -> None:
    reader = Reader(alone / "ledger")
    assert list(reader.steps) == [1, 2, 3, 4]
    for line in metrics(alone):
        records = list(reader.records(line["step"]))
        assert len(records) == 8 and len({record.key for record in records}) == 8
        assert sum(len(record.ids) for record in records) == line["completion_length_sum"]
        known = [record.rewards["letters"] for record in records]
        assert sum(known) == pytest.approx(line["reward_letters_sum"])
        assert all(record.extra["place"].startswith(str(alone.parent)) for record in records)


def test_an_evaluation_generates_for_held_out_prompts(alone: Path) -> None:
    start, end = metrics(alone, "eval")
    assert start["step"] == 0 and end["step"] == 4
    for line in (start, end):
        assert line["eval_reward_count"] == 14, "two completions of seven prompts"
        assert line["eval_reward_letters_best"] >= line["eval_reward_letters"]
    assert start["eval_reward"] != end["eval_reward"]


def test_rounds_are_kept_while_steps_are_left(alone: Path) -> None:
    assert sorted(file.name for file in (alone / "rounds").iterdir()) == ["round_00000000.npz", "round_00000001.npz"]


def test_a_run_stopped_within_a_round_goes_on_with_its_completions(ranks: RankServer, alone: Path) -> None:
    made = grpo_recipe(alone.parent)
    made = replace(made, rollout=replace(made.rollout, offload_model=True, offload_optimizer=True, sleep_level=2))
    run = write_run(made, alone.parent / "cut")
    assert ranks.run(train, world_size=1, run_dir=str(run), stop_after=3) == [75]
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    assert curve(run) == curve(alone)
    for name in ("reward", "staleness", "kl", "completion_length"):
        assert [line[name] for line in metrics(run)] == [line[name] for line in metrics(alone)]


def test_an_adapter_is_generated_with_and_its_base_is_the_reference(ranks: RankServer, alone: Path) -> None:
    tuner = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
    run = run_of(
        ranks, alone.parent, "lora", grpo={"steps_per_generation": 1}, tuner=tuner, training={"train_iters": 2}
    )
    first, second = metrics(run)
    assert first["kl"] == pytest.approx(0, abs=1e-6), "a fresh adapter changes nothing"
    assert second["kl"] > 1e-6 and second["sync_max_logp_difference"] < 1e-4
    assert first["ratio"] == second["ratio"] == pytest.approx(1), "each round is one step on its own policy"
    assert not (run / "rounds").exists(), "no step is left of a round"


def test_estimators_corrections_and_resampling_run_together(ranks: RankServer, alone: Path) -> None:
    settings = {
        "advantage_estimator": "rloo", "loss_type": "dapo", "rollout_importance_sampling_mode": "sequence_mask",
        "dynamic_sample": True, "num_iterations": 2, "steps_per_generation": 1, "top_entropy_quantile": 0.5,
        "off_policy_sequence_mask_delta": 1.0,
    }  # fmt: skip
    run = run_of(ranks, alone.parent, "together", grpo=settings, checkpoint={"no_save_optim": True})
    first, second, *_ = metrics(run)
    assert first["rollout_ess"] == pytest.approx(1, abs=1e-3) and first["rollout_corrected"] == 0
    assert abs(first["rollout_kl"]) < 1e-4 and first["kl_in_reward_count"] == 8
    assert first["reward"] == second["reward"], "both steps are on the same completions"
    assert first["prompts_equal"] >= 0 and 0 < first["entropy"] < math.log(304) + 1e-3


def train_with_a_pass(run_dir: str) -> int:
    """Computes old log-probabilities of whole rounds beforehand."""
    from megabatch.trainer.rl.rolling import Rolling

    found = Rolling._needs_old, Rolling._first_needs_old
    always = property(lambda rolling: True)
    Rolling._needs_old, Rolling._first_needs_old = always, always  # type: ignore[method-assign]
    try:
        return train(run_dir)
    finally:
        Rolling._needs_old, Rolling._first_needs_old = found  # type: ignore[method-assign]


ROUNDS_OF: dict[str, dict[str, int]] = {
    "one_step_twice": {"num_iterations": 2, "steps_per_generation": 1},
    "two_steps": {"num_iterations": 1, "steps_per_generation": 2},
    "two_steps_twice": {"num_iterations": 2, "steps_per_generation": 2},
}


@pytest.mark.parametrize("steps", ROUNDS_OF)
def test_the_first_step_of_a_round_gives_the_old_log_probabilities(ranks: RankServer, alone: Path, steps: str) -> None:
    """Bit for bit those of a pass of their own, also in a run that stops before it uses them, and at other layouts."""
    each = ROUNDS_OF[steps]
    made = grpo_recipe(alone.parent, grpo=each, checkpoint={"no_save_optim": True}, evaluation={"eval_iters": 0})
    passed, kept, cut = (write_run(made, alone.parent / f"{steps}_{name}") for name in ("passed", "kept", "cut"))
    assert ranks.run(train_with_a_pass, world_size=1, run_dir=str(passed)) == [0]
    assert ranks.run(train, world_size=1, run_dir=str(kept)) == [0]
    assert ranks.run(train, world_size=1, run_dir=str(cut), stop_after=3) == [75]
    assert ranks.run(train, world_size=1, run_dir=str(cut)) == [0]
    assert curve(kept) == curve(passed) == curve(cut)
    first, second, *_ = metrics(kept)
    assert first["ratio"] == 1 and second["ratio"] != 1
    whole = each["num_iterations"] * each["steps_per_generation"]
    for step in (1, 2, 3, 4):
        own, beforehand = (Reader(run / "ledger").records(step) for run in (kept, passed))
        for record, expected in zip(own, beforehand, strict=True):
            assert ("old" in record.columns) == ((step - 1) % whole > 0), "a round's first step reads its own"
            assert record.columns.get("old", expected.columns["old"]) == expected.columns["old"]
    for layout in ("pipeline_model_parallel_size", "context_parallel_size"):
        run = run_of(
            ranks, alone.parent, f"{steps}_{layout}", world_size=2, grpo=each, evaluation={"eval_iters": 0},
            parallel={layout: 2},
        )  # fmt: skip
        for line, expected in zip(metrics(run), metrics(kept), strict=True):
            for name in ("loss", "grad_norm", "ratio", "kl"):
                assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (layout, name)


def trained_on_little(run_dir: str) -> list[str]:
    """Warnings of rounds where the first completion of each prompt has no token."""
    from dataclasses import replace

    from megabatch.rollout.local.transformers_engine import TransformersEngine

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megabatch.trainer.rl.rolling").addHandler(handler)
    generate = TransformersEngine.generate

    def cut(engine: TransformersEngine, requests: Any) -> Any:
        return [
            replace(one, ids=(), logps=(), versions=(), finish="aborted") if one.key.endswith("/0") else one
            for one in generate(engine, requests)
        ]

    TransformersEngine.generate = cut  # type: ignore[method-assign]
    assert train(run_dir) == 0
    return said


def test_completions_without_tokens_or_rewards_are_no_fault(ranks: RankServer, alone: Path) -> None:
    settings = {
        "reward_funcs": [f"{alone.parent / 'reward.py'}:nothing"], "reward_weights": None,
        "rollout_importance_sampling_mode": "token_truncate", "steps_per_generation": 1,
    }  # fmt: skip
    made = grpo_recipe(alone.parent, grpo=settings, training={"train_iters": 2}, evaluation={"eval_iters": 0})
    run = write_run(made, alone.parent / "little")
    (said,) = ranks.run(trained_on_little, world_size=1, run_dir=str(run))
    assert said == [f"round {n}: no completion has a reward, so nothing is learned from them: nothing" for n in (0, 1)]
    for line in metrics(run):
        assert line["advantage"] == 0 and math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        assert line["completion_length"] <= 6, "two of eight have no token"
    assert {len(record.ids) for record in Reader(run / "ledger").records(1) if record.key.endswith("/0")} == {0}


def teacher_with_experts(folder: Path) -> Path:
    torch.manual_seed(9)
    config = transformers.Qwen3MoeConfig(
        vocab_size=SHAPE["padded_vocab_size"], hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    train_bpe(["a small text"], vocab_size=300, out_dir=folder)
    return folder


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_teacher_stands_in_for_rewards(kind: str, ranks: RankServer, alone: Path) -> None:
    """On the policy's own tokens the loss is the coefficient times the mean of log p_old - log p_teacher; the teacher
    is split otherwise than the policy. One with experts has all of a rank's completions in one micro-batch."""
    settings = {"loss_type": "dapo", "beta": 0.0, "steps_per_generation": 1, "teacher_kl_coef": 0.5,
                "reward_funcs": (), "reward_weights": None, "num_generations_eval": 1}  # fmt: skip
    if kind == "dense":
        folder, sizes = alone / "checkpoints" / "step_00000004" / "hf", {"teacher_tensor_model_parallel_size": 1}
        parallel: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    else:
        folder, sizes = teacher_with_experts(alone.parent / "experts"), {"teacher_expert_model_parallel_size": 2}
        parallel, settings = {}, settings | {"infer_batch_size": 4}
    run = run_of(
        ranks, alone.parent, f"taught by {kind}", world_size=2, grpo=settings, training={"train_iters": 2},
        gkd={"teacher_model": str(folder), **sizes}, parallel=parallel,
    )  # fmt: skip
    for line in metrics(run):
        records = Reader(run / "ledger").records(line["step"])
        assert all(record.rewards == {} and record.reward is None and not record.advantage for record in records)
        own = sum(sum(record.logps) for record in records)
        gaps = own - sum(sum(record.columns["teacher"]) for record in records)
        assert line["teacher_kl"] == pytest.approx(gaps / line["teacher_kl_count"], rel=1e-3, abs=1e-4)
        assert line["loss"] == pytest.approx(0.5 * line["teacher_kl"], rel=1e-5) and line["ratio"] == 1
        assert abs(line["teacher_kl"]) > 1e-4 and line["reward"] is None
    teacher = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    temperature = RunConfig.load(run / "run.json").recipe.rollout.temperature
    for record in records:
        ids = torch.tensor([*record.prompt_ids, *record.ids])
        with torch.no_grad():
            logits = teacher(ids[None]).logits[0, len(record.prompt_ids) - 1 : -1] / temperature
        expected = logits.log_softmax(1).gather(1, ids[len(record.prompt_ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(record.columns["teacher"]), expected, rtol=1e-4, atol=1e-4)


def test_a_step_whose_completions_were_all_cut_off_learns_nothing_and_the_run_goes_on(
    ranks: RankServer, alone: Path
) -> None:
    made = grpo_recipe(
        alone.parent,
        grpo={"loss_type": "dapo", "overlong_filter": True, "beta": 0.0, "steps_per_generation": 1},
        training={"train_iters": 2},
        evaluation={"eval_iters": 0, "eval_on_start": False},
    )
    made = replace(made, rollout=replace(made.rollout, max_completion_length=1))
    run = write_run(made, alone.parent / "cut-off")
    assert ranks.run(train, world_size=1, run_dir=str(run)) == [0]
    for line in metrics(run):
        assert line["cut_off"] == 1 and line["loss"] is None and line["loss_count"] == 0
        assert line["grad_norm"] == 0 and line["skipped_steps"] == 0
