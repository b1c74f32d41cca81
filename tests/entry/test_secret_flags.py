"""Secrets given as flags: refused by name, shown nowhere, and nothing is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megabatch import Recipe, Role
from megabatch.cli import recipe_command

FLAGS = [
    ("--wandb_api_key=hunter2", "--wandb_api_key is not a parameter"),
    ("--environment.HF_TOKEN=hunter2", "--environment.HF_TOKEN is not a parameter"),
    ("--dataset=https://me:hunter2@host/x.jsonl", "data.dataset holds a URL with a password"),
    ("--model=s3://bucket/x?token=hunter2", "model.model holds a secret in a URL"),
    ('--megatron_extra_kwargs={"wandb_api_key": "hunter2"}', "training.megatron_extra_kwargs holds `wandb_api_key`"),
    ("--hub_token=hunter2", "bridge.hub_token must be the name of an environment variable"),
]


@pytest.mark.parametrize(("flag", "message"), FLAGS)
def test_it_is_refused_and_not_shown(
    recipe: Recipe, flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe_() -> Recipe:
        return recipe

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        recipe_command.main(recipe_, [flag, "--submit", "--run_dir", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err
    assert "hunter2" not in said.out + said.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("action", ["--submit", "--local", "--dry_run"])
def test_a_secret_of_a_servers_command_comes_into_no_run_json(
    recipe: Recipe, action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe_() -> Recipe:
        return replace(recipe, roles=[Role(name="server", command=["serve", "--token=hunter2xyz"])])

    with pytest.raises(SystemExit) as ended:
        recipe_command.main(recipe_, [action, "--run_dir", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "roles['server'].command holds a value for token" in said.err
    assert "hunter2" not in said.out + said.err
    assert not (tmp_path / "run").exists()
