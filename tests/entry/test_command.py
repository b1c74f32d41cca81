"""A recipe's command line, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch import Recipe
from megabatch.cli.recipe_command import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def without_slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which no program but a few of coreutils is found, like a laptop's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return {name: value for name, value in os.environ.items() if name != "PATH"} | {"PATH": str(folder)}


def _run(
    file: Path, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, file, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_faults_are_reported_together_and_nothing_is_made(tmp_path: Path) -> None:
    done = _run(
        RECIPES / "qwen3_moe_sft.py", "--expert_model_parallel_size", "6", "--micro_batch_size", "3", "--submit",
        cwd=tmp_path,
    )  # fmt: skip
    first, *faults = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert first.startswith("error: ") and first.endswith("faults, nothing was started")
    assert any("expert_model_parallel_size=6" in line and "num_experts=128" in line for line in faults)
    assert any("global_batch_size=4" in line and "try 3 or 6" in line for line in faults)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_needs_no_slurm_and_makes_nothing(tmp_path: Path, without_slurm: dict[str, str]) -> None:
    cwd = tmp_path / "work"
    cwd.mkdir()
    done = _run(RECIPES / "qwen3_moe_sft.py", "--dry_run", cwd=cwd, env=without_slurm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=qwen3-moe-sft\n")
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert "world 8 = tp 4 x pp 2 x cp 1 x dp 1" in done.stderr and "30.5 B parameters" in done.stderr
    assert "hf download Qwen/Qwen3-30B-A3B-Instruct-2507" in done.stderr
    assert list(cwd.iterdir()) == []


def test_the_plan_without_an_action(tmp_path: Path) -> None:
    done = _run(RECIPES / "quickstart.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "usage: python quickstart.py" in done.stdout and "example:arithmetic#400" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_parameters(tmp_path: Path) -> None:
    done = _run(RECIPES / "quickstart.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--expert_model_parallel_size" in done.stdout


def test_what_is_missing_here_only_is_no_fault_of_a_dry_run(tmp_path: Path) -> None:
    done = _run(RECIPES / "quickstart.py", "--dataset", "/on/the/cluster.jsonl", "--dry_run", cwd=tmp_path)
    assert done.returncode == 0 and "refused here" in done.stderr and "/on/the/cluster.jsonl" in done.stderr
    done = _run(RECIPES / "quickstart.py", "--dataset", "/on/the/cluster.jsonl", "--submit", cwd=tmp_path)
    assert done.returncode == 2 and "error: 1 fault, nothing was started" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor_parallel_size", "2"], "try --tensor_model_parallel_size"),
        (["--lr", "fast"], "learning_rate.lr='fast' must be"),
        (["--submit", "--local"], "--submit and --local exclude each other"),
        (["--cluster", "nowhere.toml", "--dry_run"], "nowhere.toml"),
        (["--run_dir", "", "--dry_run"], "--run_dir='' is blank"),
        (["--save", __file__, "--dry_run"], f"{__file__} is a file"),
        (["--save_steps", "5", "--save_interval", "5"], "give one of them"),
    ],
)
def test_mistakes_get_one_clear_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = _run(RECIPES / "quickstart.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr


def test_a_recipe_that_goes_to_another_folder_before_its_main_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("import os\nos.chdir('/')\nfrom megabatch import main\nmain(lambda: None)\n")
    done = _run(Path("r.py"), "--dry_run", cwd=tmp_path)
    assert done.returncode == 2 and "r.py changes the current folder to /, so that relative paths" in done.stderr


def test_a_field_that_does_not_exist_is_explained_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "from megabatch import Parallel, Recipe, main\n"
        "def recipe() -> Recipe:\n"
        "    return Recipe(name='x', task='sft', parallel=Parallel(tensor_model_parallel=2))\n"
        "main(recipe)\n"
    )
    done = _run(file, "--dry_run", cwd=tmp_path)
    assert done.returncode == 2
    assert "wrong.py:3: Parallel(tensor_model_parallel=…)" in done.stderr
    assert "tensor_model_parallel_size" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_a_run_for_gpus_is_not_started_without_them(tmp_path: Path) -> None:
    flags = ["--gpus_per_node", "2", "--distributed_backend", "nccl", "--local"]
    done = _run(RECIPES / "quickstart.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "resources.gpus_per_node=2 needs 2 GPUs with --local, and this machine has 0" in done.stderr


def test_a_closed_pipe_is_no_crash(tmp_path: Path) -> None:
    command = f"{sys.executable} {RECIPES / 'quickstart.py'} --help | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: ") and done.stderr == ""


def test_local_trains_and_exports(tmp_path: Path) -> None:
    """Two ranks, three steps: the terminal shows progress and says where everything is."""
    flags = ["--train_iters", "3", "--lr_warmup_iters", "1", "--run_dir", "run", "--dataset", "example:arithmetic#40"]
    done = _run(RECIPES / "quickstart.py", *flags, "--local", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    exported = tmp_path / "run" / "checkpoints" / "step_00000003" / "hf"
    assert str(exported) in done.stdout and "step 3 of 3" in done.stdout
    assert {"config.json", "tokenizer.json"} <= {path.name for path in exported.iterdir()}
    assert list(exported.glob("*.safetensors"))
    again = _run(RECIPES / "quickstart.py", *flags, "--lr", "0.5", "--local", cwd=tmp_path)
    assert again.returncode == 2 and "holds another run (it differs in learning_rate.lr)" in again.stderr


def test_a_plan_says_where_completions_cannot_be_as_long_as_asked(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the recipe takes 64 tokens."""
    monkeypatch.chdir(tmp_path)
    flags = "--task rlhf --rlhf_type grpo --num_generations 2 --reward_funcs accuracy"
    most = "rollout.max_completion_length={}: the model takes 64 tokens"
    for prompt, completion, note in (
        (32, 100, f"every prompt leaves less than {most.format(100)}"),
        (32, 48, f"prompts of more than 16 tokens leave less than {most.format(48)}"),
        (32, 32, None),
    ):
        lengths = ["--max_length", str(prompt), "--max_completion_length", str(completion)]
        with pytest.raises(SystemExit) as ended:
            main(lambda: recipe, ["--dry_run", *flags.split(), *lengths])
        said = capsys.readouterr().err
        assert not ended.value.code, said
        assert note in said if note else "leave" not in said
