"""`--chain N`: one run as several jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabatch import Recipe
from megabatch.cli.recipe_command import run
from megabatch.errors import ConfigError


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_script_looks_at_earlier_links_first_and_does_not_requeue(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: recipe, ["--dry_run", "--chain", "3"]) == 0
    script, plan = capsys.readouterr()
    assert "\njobs         3 in a row, each continuing where the previous one stopped; none requeues" in plan
    assert "#SBATCH --no-requeue\n" in script and "still_ours()" not in script
    assert script.index("nothing left to do") < script.index("export MEGABATCH_ATTEMPT")
    run(lambda: recipe, ["--dry_run"])
    script, plan = capsys.readouterr()
    assert "nothing left to do" not in script and "\njobs " not in plan


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--chain", "0", "--submit"], "--chain='0' must be a whole number, at least 1"),
        (["--chain", "2", "--local"], "--chain is for Slurm"),
        (["--chain", "--submit"], "--chain needs one value"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: Recipe, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(lambda: recipe, words)
