"""Servers beside the ranks, as a recipe declares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabatch import Batch, Data, Model, Recipe, Resources, Role, Training
from megabatch.config.new_model import declared_shape
from megabatch.config.rules.check import check
from megabatch.config.run import RunConfig, resolve

SERVER = Role(name="server", command=["python", "serve.py"])
RECIPE = Recipe(
    name="served",
    task="sft",
    model=Model(
        model_type="qwen3",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        padded_vocab_size=512,
        max_position_embeddings=256,
        torch_dtype="bfloat16",
    ),
    data=Data(dataset=["example:arithmetic#16"], max_length=64),
    batch=Batch(micro_batch_size=1, global_batch_size=8),
    training=Training(train_iters=1),
    resources=Resources(nodes=1, gpus_per_node=8),
    roles=[SERVER, replace(SERVER, name="judge", nodes=2)],
)


def test_roles_are_in_run_json_and_come_back(tmp_path: Path) -> None:
    shape = declared_shape(RECIPE)
    assert shape is not None
    run = resolve(RECIPE, shape=shape, run_dir=tmp_path, provenance={})
    assert run.layout.world_size == 8, "servers are no ranks"
    run.save(tmp_path / "run.json")
    again = RunConfig.load(tmp_path / "run.json")
    assert again == run
    assert again.recipe.roles == (SERVER, replace(SERVER, name="judge", nodes=2))
    assert [role.variable for role in again.recipe.roles] == ["MEGABATCH_ROLE_SERVER", "MEGABATCH_ROLE_JUDGE"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Server"}, "lower-case"),
        ({"name": "rank"}, "not be rank"),
        ({"name": "judge"}, "names 2 roles"),
        ({"command": []}, "must be a list"),
        ({"command": "python serve.py"}, "must be a list"),
        ({"tasks_per_node": 0}, "at least 1"),
        ({"health": "ready"}, "path"),
        (
            {"command": ["serve", "--token=hunter2xyz"]},
            "command holds a value for token, but others can read run directories",
        ),
        ({"command": ["serve", "--password", "hunter2xyz"]}, "command holds a value for password"),
        ({"command": ["serve", "-H", "Authorization: Bearer hunter2xyz"]}, "command holds a secret for HTTP"),
        ({"command": "serve --token=hunter2xyz"}, "command must be a list"),
        ({"health": "/health?token=hunter2xyz"}, "health holds"),
    ],
)
def test_faults_are_named(change: dict[str, Any], says: str) -> None:
    changed = replace(RECIPE, roles=[replace(SERVER, **change), *RECIPE.roles[1:]])
    assert any(fault.field.startswith("roles[") and says in str(fault) for fault in check(changed))
    assert "hunter2" not in "".join(map(str, check(changed)))
    assert not check(RECIPE)
