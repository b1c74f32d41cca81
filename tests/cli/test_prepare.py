"""`megabatch prepare`: what it makes and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from megabatch.cli import command, recipe_command
from megabatch.cli.recipe_file import load_recipe
from megabatch.run_directory import RunDirectory
from megabatch.slurm.state import status

from ..slurm.conftest import until

RECIPE = """
from megabatch import Batch, Data, Model, Parallel, Recipe, Resources, Training


def recipe() -> Recipe:
    return Recipe(
        name="small",
        task="sft",
        model=Model(model_type="qwen3", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
                    num_query_groups=2, kv_channels=8, padded_vocab_size=304, max_position_embeddings=256,
                    torch_dtype="float32"),
        data=Data(dataset=["example:arithmetic#20"], max_length=256),
        batch=Batch(global_batch_size=8),
        training=Training(max_epochs=3),
        parallel=Parallel(distributed_backend="gloo"),
        resources=Resources(gpus_per_node=0, tasks_per_node=1),
    )
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_it_makes_the_cache_and_says_how_long_the_run_is(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert command.main(["prepare", str(recipe_file)]) == 0
    said = capfd.readouterr().out
    assert "7 steps; an epoch draws all 20 samples" in said  # 20 x 3 // 8
    assert "the last epoch ends 4 samples early" in said
    [made] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert str(made) in said
    assert json.loads((made / "meta.json").read_text())["samples"] == 20
    made_here = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert made_here == {"cache", "recipe.py"}, "no run directory"
    assert command.main(["plan", str(recipe_file)]) == 0
    assert f"7 steps: 3 epochs of 20 samples, {tokens_in(made):,} tokens, counted in {made}" in capfd.readouterr().out
    assert command.main(["prepare", str(recipe_file), "--global_batch_size", "32"]) == 2
    assert "is more than the 20 samples of the training data" in capfd.readouterr().err


def test_tokens_are_prepared_without_torch(tmp_path: Path) -> None:
    run_dir = runs.write_run(runs.recipe(tmp_path, "qwen3"), tmp_path / "run")
    code = "import sys; from megabatch.data.prepare import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = [sys.executable, "-c", code, str(run_dir / "run.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("\n0 False\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "the run would not find the cache: set MEGABATCH_CACHE"),
        (["--local"], "--local has no effect on a preparation"),
        (["--run_dir", "x"], "--run_dir has no effect on a preparation"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max_epoch", "3"], "max_epochs"),
    ],
)
def test_what_it_refuses(
    recipe_file: Path,
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MEGABATCH_CACHE", raising=False)
    assert command.main(["prepare", str(recipe_file), *flags]) == 2
    assert said in capfd.readouterr().err


def tokens_in(cache: Path) -> int:
    return (cache / "ids.bin").stat().st_size // 4


LENGTH = re.compile(r"^length +(.*)$", re.MULTILINE)


def test_plans_count_what_is_prepared_and_nothing_else(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def length(*flags: str) -> str:
        assert command.main(["plan", str(recipe_file), "--dataset", "rows.jsonl", *flags]) == 0
        return LENGTH.findall(capfd.readouterr().out)[0]

    def prepared(*flags: str) -> str:
        assert command.main(["prepare", str(recipe_file), "--dataset", "rows.jsonl", *flags]) == 0
        return LENGTH.findall(capfd.readouterr().out)[0]

    assert "counted when the data is prepared" in length()
    split, packed = ("--split_dataset_ratio", "0.1"), ("--packing", "--global_batch_size", "1")
    assert "18 steps; an epoch draws all 50 samples" in prepared()
    assert "16 steps; an epoch draws all 45 samples" in prepared(*split)
    [(steps, packs)] = re.findall(r"(\d+) steps; an epoch draws all 50 samples in (\d+) packs", prepared(*packed))
    assert length().startswith("18 steps: 3 epochs of 50 samples, ")  # 50 x 3 // 8
    assert length("--num_workers", "0", "--dataset_num_proc", "2", "--lr", "1e-3").startswith("18 steps: 3 epochs")
    assert length("--global_batch_size", "16").startswith("9 steps: 3 epochs of 50 samples, ")  # 150 // 16
    assert length("--max_epochs", "1").startswith("6 steps: 1 epoch of 50 samples, ")
    assert length(*split).startswith("16 steps: 3 epochs of 45 samples, ")
    assert length(*packed).startswith(f"{steps} steps: 3 epochs of {packs} packed rows of 50 samples, ")
    drawn = length("--max_epochs", "null", "--train_iters", "10")
    assert drawn.startswith("10 steps, which draw 80 samples: 1.60 epochs of 50 samples, ")
    for other in (["--seed", "7"], ["--max_length", "99"], ["--system", "x"], ["--padded_vocab_size", "312"]):
        assert "counted when" in length(*other), other
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    assert "counted when" in length()
    prepared()
    assert length().startswith("19 steps: 3 epochs of 51 samples, ")
    for path in (tmp_path / "cache").glob("*/meta.json"):
        path.unlink()
    assert "counted when" in length()


CPUS = """
partition = "gpu"
qos = "high"
constraint = "h100"
time = "1:00:00"
gpu_request = "gres"
gpu_type = "h100"
account = "lab"

[sbatch]
mem-per-gpu = "10G"

[prepare]
partition = "cpu"
time = "2:00:00"
"""


def directives(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}


def test_its_job_asks_for_one_node_without_gpus(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text(CPUS)
    recipe_file.write_text(
        RECIPE.replace("tasks_per_node=1", "nodes=4, mem_gib=900")
        .replace("_node=0", "_node=8")
        .replace("size=8", "size=32")
    )
    flags = ["--dry_run", "--cluster", "./site.toml", "--dataset_num_proc", "6", "--distributed_backend", "nccl"]
    assert command.main(["prepare", str(recipe_file), *flags]) == 0
    said = directives(capfd.readouterr().out)
    assert said >= {"job-name=small-prepare", "partition=cpu", "account=lab", "nodes=1", "ntasks-per-node=1"}
    assert said >= {"cpus-per-task=6", "time=2:00:00"}
    assert not [line for line in said if line.startswith(("gpu", "gres", "mem", "qos", "constraint"))]
    more = ["--mem_gib", "64", "--time", "10:00", "--cpus_per_task", "3"]
    assert command.main(["prepare", str(recipe_file), *flags, *more]) == 0
    said = directives(capfd.readouterr().out)
    assert said >= {"mem=64G", "time=10:00", "cpus-per-task=3"}
    (tmp_path / "site.toml").write_text(CPUS.partition("[prepare]")[0])
    assert command.main(["prepare", str(recipe_file), *flags]) == 0
    said = directives(capfd.readouterr().out)
    assert said >= {"partition=gpu", "qos=high", "constraint=h100", "time=1:00:00"}
    assert not [line for line in said if line.startswith(("gpu", "gres", "mem"))]
    assert command.main(["prepare", str(recipe_file), *flags, "--nodes", "2"]) == 2
    assert "--nodes has no effect on a preparation" in capfd.readouterr().err
    assert not (tmp_path / "megatron_output").exists()


def test_a_cache_outside_every_mount_is_refused(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", "/elsewhere/cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text('[container]\nimage = "x.sqsh"\n')
    assert command.main(["prepare", str(recipe_file), "--submit", "--cluster", "./site.toml"]) == 2
    assert "MEGABATCH_CACHE='/elsewhere/cache' is not mounted in the container" in capfd.readouterr().err


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_run_finds_what_the_job_made(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text('partition = "batch"\n\n[prepare]\npartition = "urgent"\n')
    cluster = ["--cluster", "./site.toml"]
    assert command.main(["prepare", str(recipe_file), "--submit", *cluster]) == 0
    assert "1 rank, in " in capfd.readouterr().out
    [folder] = (tmp_path / "megatron_output" / "small-prepare").glob("v0-*")
    until(lambda: not status([folder], fresh_s=0)[0].state.active, what="the tokens")
    for words, part in (([], "completed"), (["--json"], '"state": "completed"')):
        assert command.main(["status", str(folder), *words]) == 0
        assert part in capfd.readouterr().out
    assert "#SBATCH --partition=urgent\n" in (folder / "job.sbatch").read_text()
    assert command.main(["logs", str(folder)]) == 0
    said = capfd.readouterr().out
    [made] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert str(made) in said and "7 steps" in said
    with pytest.raises(SystemExit) as end:
        recipe_command.main(load_recipe(recipe_file), ["--submit", *cluster, "--run_dir", "run"])
    assert not end.value.code
    until(lambda: not status([Path("run")], fresh_s=0)[0].state.active, what="the run")
    assert status([Path("run")], fresh_s=0)[0].state.value == "completed"
    log = RunDirectory(Path("run")).rank_log(0, 0).read_text()
    assert str(made) in log, log
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [made], "nothing was tokenised again"


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_why_explains_a_job_with_faulty_rows(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGABATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": 5}\n')
    (tmp_path / "site.toml").write_text('partition = "urgent"\n')
    flags = ["--submit", "--dataset", "rows.jsonl", "--run_dir", "tokens", "--cluster", "./site.toml"]
    assert command.main(["prepare", str(recipe_file), *flags]) == 0
    until(lambda: not status([Path("tokens")], fresh_s=0)[0].state.active, what="its end")
    capfd.readouterr()
    assert command.main(["why", "tokens"]) == 0
    assert "rows.jsonl:1" in capfd.readouterr().out


def test_the_command_line_knows_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megabatch.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "prepare" in done.stdout
