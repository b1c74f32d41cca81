"""What a person meets who gives a recipe something wrong: one error with place and fix, and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megabatch.config.model import Model
from megabatch.config.new_model import declared_shape
from megabatch.config.recipe import Recipe
from megabatch.converters.bijection import TensorInfo
from megabatch.converters.families import family_named
from megabatch.converters.safetensors_io import Writer
from megabatch.run_directory import ExitCode
from megabatch.slurm.queue import State

from .conftest import RECIPES, NewTraining

FAULTY_LINE = 4711


def recipe(file: str, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python recipes/FILE …` with no Slurm in reach, should a fault not be found in time."""
    return subprocess.run(
        [sys.executable, "-P", str(RECIPES / file), *map(str, words)],
        env=os.environ | {"SLURM_CONF": str(folder / "none")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def require_refused(done: subprocess.CompletedProcess[str], folder: Path, *, saying: str) -> None:
    """One error before anything started."""
    assert (done.returncode, done.stdout) == (ExitCode.CONFIG, ""), done.stderr
    assert re.fullmatch(rf"(?s)error: 1 fault, nothing was started\n  [^\n]*{saying}[^\n]*\n", done.stderr), (
        done.stderr
    )
    assert not (folder / "run").exists() and not (folder / "megatron_output").exists()


@pytest.mark.parametrize("action", ["--submit", "--local", "--dry_run"])
@pytest.mark.parametrize(
    ("flags", "saying"),
    [
        ("--train_iters many", r"training.train_iters='many' must be a whole number"),
        ("--train_itres 5", r"--train_itres is not a parameter; try --train_iters"),
        ("--expert_model_parallel_size 3 --tasks_per_node 3 --global_batch_size 24",
         r"parallel.expert_model_parallel_size=3 must divide .*num_experts=4; try 1"),
        ("--dataset nowhere.jsonl", r"data.dataset: dataset 'nowhere.jsonl' does not exist"),
        ("--model nowhere", r"model.model='nowhere' does not exist"),
        ("--tokenizer ./nowhere", r"model.tokenizer: there is no folder nowhere; give one with tokenizer.json"),
    ],
)  # fmt: skip
def test_faults_of_the_command_line(action: str, flags: str, saying: str, tmp_path: Path) -> None:
    words = [*flags.split(), *([] if action == "--dry_run" else ["--run_dir", "run"])]
    done = recipe("quickstart.py", action, *words, folder=tmp_path)
    if action == "--dry_run" and "nowhere" in flags:
        assert done.returncode == ExitCode.DONE, "a plan is made without the data, and says what is missing"
        assert re.search(saying, done.stderr), done.stderr
    else:
        require_refused(done, tmp_path, saying=saying)


def _jsonl(path: Path, *, fault: bytes) -> None:
    lines = [json.dumps({"query": f"What is {i} + 1?", "response": f"{i + 1}."}).encode() for i in range(5000)]
    lines[FAULTY_LINE - 1] = fault
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("fault", "saying"),
    [
        (b'{"query": "What is 1', "not valid JSON"),
        (b'{"query": "What is 1?", "response": "\xff"}', "not UTF-8 .byte 0xff at column 38.; fix that line"),
        (b'["What is 1?", "1"]', "is a JSON list; each row must be an object"),
        (b'{"question": "What is 1?"}', "no accepted format has the fields 'question'; accepted are .*query.response"),
        (b'{"query": "What is 1?", "response": null}', "no accepted format has the fields 'query', 'response' .null."),
        (b'{"query": "What is 1?", "response": " "}', "the assistant is empty; fill it or delete the row"),
    ],
)  # fmt: skip
def test_a_malformed_line(fault: bytes, saying: str, tmp_path: Path) -> None:
    _jsonl(tmp_path / "data.jsonl", fault=fault)
    done = recipe("quickstart.py", "--submit", "--run_dir", "run", "--dataset", "data.jsonl", folder=tmp_path)
    require_refused(done, tmp_path, saying=f"data.dataset: data.jsonl:{FAULTY_LINE}: .*{saying}")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_dataset(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    done = recipe("quickstart.py", "--submit", "--run_dir", "run", "--dataset", "data.jsonl", folder=tmp_path)
    require_refused(done, tmp_path, saying="data.dataset: data.jsonl (is empty|holds no rows); give a file with")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model from a hub: config.json, weights of zeros, and a tokenizer's file."""
    folder = tmp_path / "model"
    folder.mkdir()
    declared = Model(model_type="qwen3", num_layers=1, hidden_size=32, num_attention_heads=4, padded_vocab_size=128)
    shape = declared_shape(Recipe(name="model", task="sft", model=declared))
    assert shape is not None
    family = family_named("qwen3")
    config = family.hf_config(shape)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: TensorInfo("F32", size) for name, size in family.hf_tensors(family.shape(config)).items()}
    writer = Writer(folder / "model.safetensors", tensors)
    for name, info in tensors.items():
        writer.write(name, bytes(4 * math.prod(info.shape)))
    writer.close()
    (folder / "tokenizer.json").write_text("{}")
    return folder


TUNE = """
from megabatch import Data, Model, Recipe, Resources, Training, main


def recipe():
    return Recipe(
        name="tune",
        task="sft",
        model=Model(model="model"),
        data=Data(dataset=["example:arithmetic"]),
        training=Training(train_iters=1),
        resources=Resources(nodes=1, gpus_per_node=1),
    )


if __name__ == "__main__":
    main(recipe)
"""


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _scramble(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(30)
        file.write(b"\0" * 8)


@pytest.mark.parametrize(
    ("name", "damage", "saying"),
    [
        ("tokenizer.json", Path.unlink, "model.tokenizer: .* has no tokenizer; it must hold tokenizer.json"),
        ("tokenizer.json", _cut, "model.tokenizer: .*tokenizer.json is not valid JSON .*; download it again"),
        ("config.json", Path.unlink, "model.model: .*config.json"),
        ("config.json", _cut, "model.model: .*config.json: .*not valid JSON"),
        ("model.safetensors", Path.unlink, "model.model: .*safetensors"),
        ("model.safetensors", _cut, "model.model: .*model.safetensors: truncated: its header gives [0-9]+ bytes"),
        ("model.safetensors", _scramble, "model.model: .*model.safetensors: header is not valid"),
    ],
)  # fmt: skip
def test_a_damaged_model(name: str, damage: Callable[[Path], None], saying: str, model: Path, tmp_path: Path) -> None:
    damage(model / name)
    (tmp_path / "tune.py").write_text(TUNE)
    done = recipe(str(tmp_path / "tune.py"), "--submit", "--run_dir", "run", folder=tmp_path)
    require_refused(done, tmp_path, saying=saying)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that takes one checkpoint of the quickstart and not two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "megabatch-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    flags = {"run_dir": small_disk / "run", "save_interval": 3, "save_total_limit": "none", "train_iters": 6}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = recipe("quickstart.py", "--local", *words, folder=tmp_path)
    assert done.returncode == ExitCode.FAILED
    [error] = [line for line in done.stdout.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert re.match("error: the checkpoint of step 6 was not saved: .* MiB are free there; .*save elsewhere", error)
    checkpoints = small_disk / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000003"]
    assert (checkpoints / "latest").read_text() == "step_00000003\n"

    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    again = recipe("quickstart.py", "--local", *words, folder=tmp_path)
    assert again.returncode == ExitCode.DONE, again.stdout
    assert "resuming from" in again.stdout
    assert (checkpoints / "latest").read_text() == "step_00000006\n"


@pytest.mark.slurm
def test_a_dataset_that_breaks_while_the_job_waits(new_training: NewTraining, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    _jsonl(data, fault=b'{"query": "What is 1?", "response": "1"}')
    training = new_training("broken", sbatch={"hold": True}, dataset=data)
    _jsonl(data, fault=b'{"query": "What is 1')
    subprocess.run(["scontrol", "release", str(training.now().job_id)], env=training.environment, check=True)
    end = training.wait(State.FAILED)
    assert (end.exit_code, end.attempt) == (ExitCode.CONFIG, 0)
    for rank in (0, 1):
        log = training.files.rank_log(rank, 0).read_text()
        # Slurm ends the step of the slower rank, and says so in its log
        said = [line for line in log.splitlines() if not line.startswith("slurmstepd")]
        assert len(said) == 1, log
        assert re.match(rf"error: .*{data}:{FAULTY_LINE}: not valid JSON .*; fix or delete that line", said[0])
    assert not training.files.checkpoints.exists()
