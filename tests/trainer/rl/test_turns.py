"""GRPO over conversations of several turns: what is trained on, and what the ledger has of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rank_server import RankServer
from runs import metrics, recipe, train, write_run

from megabatch import Grpo, Rlhf, Rollout
from megabatch.data.rows.files import Origin, Row
from megabatch.data.rows.prompts import prompt_of
from megabatch.data.tokens.templates import Template
from megabatch.ledger.reader import Reader
from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.rollout.turns.conversations import Answer, Conversation, converse
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.rl.turns import Turns

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


READS_ROWS = """{%- if tools %}<|im_start|>tools
{{ tools[0].function.name }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %} {{ mood }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {{ mood }}
{% endif %}"""
"""A template in which every turn shows the row's variable `mood` and its message's name."""
ANSWERS = """
class Names:
    def reset(self, messages, **columns):
        assert messages == [{"role": "user", "content": "six"}] and not columns
    def step(self, completion):
        return {"role": "user", "content": f"not {completion}", "name": "judge"}, None, False
"""


@pytest.mark.parametrize("mood", ["two", None])
def test_every_turn_is_rendered_with_the_row_s_own_variables(mood: str | None, bpe: Any, tmp_path: Path) -> None:
    """The whole conversation is what transformers renders with the same variables, tools and messages."""
    (tmp_path / "names.py").write_text(ANSWERS)
    tokenizer = copy.copy(bpe)
    tokenizer.chat_template = READS_ROWS
    tools = [{"type": "function", "function": {"name": "add"}}]
    own = {} if mood is None else {"chat_template_kwargs": {"mood": mood}}
    asked = prompt_of(Row(Origin("f", 1), {"query": "six", "tools": tools, **own}))
    template = Template(tokenizer, variables={"mood": "one"})
    rollout = Rollout(gym_env=f"{tmp_path}/names.py:Names", use_gym_env=True, max_turns=3)
    turns = Turns(
        ranks=cast(Ranks, None),  # which a single conversation does not ask
        rollout=rollout,
        text=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        template=template,
        positions=500,
    )
    (prompt,) = template.encode_prompts([asked.conversation], places=["f:1"])
    said = iter(["two", "four", "seven"])

    def generate(requests: Sequence[Request]) -> list[Completion]:
        ids = [
            *tokenizer(next(said), add_special_tokens=False)["input_ids"],
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
        ]
        return [
            Completion(key=one.key, ids=tuple(ids), logps=(0.0,) * len(ids), versions=(0,) * len(ids), finish="stop")
            for one in requests
        ]

    partner = turns.partner(lambda key: asked)

    def answer(some: Sequence[Conversation]) -> list[Answer]:
        return [partner.answer(one) for one in some]

    sampling = Sampling(temperature=1.0, max_tokens=400, stop_ids=())
    request = Request(key="0", prompt=tuple(prompt.ids.tolist()), sampling=sampling, seed=1)
    (found,) = converse([request], generate=generate, answer=answer, limits=turns.limits)
    messages: list[dict[str, str]] = [{"role": "user", "content": "six"}]
    for text in ("two", "four"):
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": f"not {text}", "name": "judge"},
        ]
    theirs = tokenizer.apply_chat_template(
        messages, tools=tools, mood=mood or "one", tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode([*request.prompt, *found.ids]) == f"{theirs}seven<|im_end|>"
