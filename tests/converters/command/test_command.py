"""The command as people type it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megabatch.converters.command import main
from megabatch.converters.command.flags import FLAGS, Flags, command_line, parse
from megabatch.converters.request import ConversionRequest
from megabatch.errors import ConversionError

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from made_folders import MOE, contents, make_folder

COMMAND = [sys.executable, "-m", "megabatch.converters.command"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("made") / "hf", MOE)


def test_there_and_back_again(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mcore, back = str(tmp_path / "mcore"), str(tmp_path / "back")
    assert main(["--to_mcore", "true", "--model", str(hf), "--output_dir", mcore]) == 0
    assert re.search(r"mcore: wrote .* kB in .* s, .*/s; complete", capsys.readouterr().out)
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert main(["--to-hf", "--mcore_model", mcore, "--output_dir", back, "--max_shard_size", "200KB"]) == 0
    found, source = contents(tmp_path / "back"), contents(hf)
    del found["megabatch-manifest.json"]
    assert found == source


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--to_hf"], Flags(request=ConversionRequest(to_hf=True))),
        (["--to_hf", "true", "--exist_ok=false"], Flags(request=ConversionRequest(to_hf=True))),
        (["--to-mcore=1", "--workers", "3"], Flags(request=ConversionRequest(to_mcore=True), workers=3)),
        (["--max_shard_size=2GiB", "--resume", "off"], Flags(request=ConversionRequest(max_shard_size="2GiB"))),
        (["--adapters", "a", "b"], Flags(request=ConversionRequest(adapters=("a", "b")))),
        (["-h"], Flags(help=True)),
        ([], Flags()),
    ],
)
def test_flags_are_read(arguments: list[str], expected: Flags) -> None:
    assert parse(arguments) == expected
    assert parse(command_line(expected)) == expected


def test_a_command_line_holds_every_flag() -> None:
    given = {name: "x" if flag.default is None else _other(flag.default) for name, flag in FLAGS.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", *_texts(value))]
    assert command_line(parse(words)) == words


def _other(default: object) -> object:
    """A value that is not the default."""
    return {bool: True, int: 7, str: "x", tuple: ("a", "b")}[type(default)]


def _texts(value: object) -> tuple[str, ...]:
    return () if value is True else value if isinstance(value, tuple) else (str(value),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to_hff"], r"--to_hff is not a flag; did you mean --to_hf\?"),
        (["--mcore-modell", "x"], r"--mcore_modell is not a flag; did you mean --mcore_model\?"),
        (["--qqqqqq"], "--qqqqqq is not a flag; see --help"),
        (
            ["--tensor_model_parallel_size", "2"],
            "--tensor_model_parallel_size has no effect: a checkpoint has no layout",
        ),
        (["--to_hf", "perhaps"], "--to_hf perhaps must be true or false"),
        (["--workers", "many"], "--workers many must be a whole number"),
        (["--model"], "--model needs one value"),
        (["--model", "a", "b"], "--model needs one value, not 'a b'"),
        (["--resume", "--resume"], "--resume is given twice"),
        (["folder", "--resume"], "'folder' is not a flag"),
    ],
)
def test_faults_of_the_command_line_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        parse(arguments)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(ConversionError, match=r"--to_hff .*\n.*--workers x"):
        parse(["--to_hff", "--workers", "x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to_mcore", "--to_hf", "--output_dir", "o"], "exclude each other"),
        (["--to_mcore", "--output_dir", "o"], "--to_mcore needs --model"),
        (["--to_hf", "--model", "m", "--output_dir", "o"], "--to_hf needs --mcore_model"),
        (["--to_mcore", "--model", "m"], "--output_dir is missing"),
        (["--model", "m", "--output_dir", "o"], "give --to_mcore or --to_hf"),
        (["--verify", "--model", "m", "--resume", "--output_dir", "o"], "--model, --resume: --verify alone"),
        (["--to_mcore", "--model", "m", "--output_dir", "o", "--max_shard_size", "1GB"], "--max_shard_size is about"),
        (
            ["--to_mcore", "--model", "m", "--output_dir", "o", "--test_convert_dtype", "bfloat16"],
            "--test_convert_dtype has no effect without --test_convert_precision",
        ),
        (["--to_mcore", "--model", "m", "--output_dir", "o", "--fp8_quantise"], "folder that --to_hf writes"),
        (
            ["--to_hf", "--mcore_model", "m", "--output_dir", "o", "--expert_layout", "x"],
            "must be per_expert or fused",
        ),
        (["--to_hf", "--mcore_model", "m", "--output_dir", "o", "--accept_bin"], "those of --mcore_model are"),
        (
            ["--to_hf", "--model", "m", "--output_dir", "o", "--fp8_quantise", "--test_convert_precision"],
            "in FP8 differ",
        ),
        (
            ["--to_hf", "--mcore_model", "m", "--output_dir", "o", "--rank", "1"],
            "--rank and --world must be given together",
        ),
        (
            ["--to_hf", "--mcore_model", "m", "--output_dir", "o", "--rank", "2", "--world", "2"],
            "rank must be from 0 to world - 1",
        ),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_flag_and_needs_no_heavy_package() -> None:
    code = "import sys; from megabatch.converters.command import main; main(['--help']); print(*sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *lines, modules = text.splitlines()
    for flag in FLAGS:
        assert f"--{flag}" in "\n".join(lines)
    heavy = {"numpy", "torch", "json.decoder", "concurrent.futures", "argparse", "megabatch.config"}
    assert not heavy & set(modules.split())


def test_moving_bytes_needs_neither_numpy_nor_torch(hf: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from megabatch.converters.command import main; "
        f"main(['--to_mcore', '--model', {str(hf)!r}, '--output_dir', {str(tmp_path / 'o')!r}, '--verify']); "
        "print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "safetensors", "transformers"} & set(modules)
    assert "megabatch.converters.engine.execute" in modules


def test_a_dry_run_shows_every_tensor_and_writes_nothing(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    flags = ["--to_mcore", "--model", str(hf), "--output_dir", out, "--torch_dtype", "float16"]
    assert main([*flags, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert os.listdir(tmp_path) == []
    assert re.search(r"decoder\.layers\.1\.mlp\.experts\.linear_fc1\.weight\[4\] \[1, 1, 64, 64\] BF16 to F16", text)
    assert "bytes of disk space are needed" in text
    main(flags)
    made = json.loads((tmp_path / "out" / "megabatch-manifest.json").read_text())
    assert f"plan {made['plan']}" in text
    for name, file in made["files"].items():
        if name.endswith(".distcp"):
            assert f"{name}: {file['size']} bytes, " in text
            assert all(f"{part} [" in text for part, *_ in file["ranges"] if part != "end")


def test_verify_with_and_without_a_source(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = ["--to_mcore", "--model", str(hf), "--output_dir", str(out), "--verify"]
    assert main(given) == 0
    assert main(["--verify", "--output_dir", str(out)]) == 0
    assert "as its manifest says" in capsys.readouterr().out
    assert main(given) == 0
    assert "equal to its source" in capsys.readouterr().out
    with open(out / "release" / "__0_1.distcp", "r+b") as file:
        file.seek(5000)
        file.write(b"0123456789")
    for flags in (given, ["--verify", "--output_dir", str(out)]):
        assert main(flags) == 1
        assert re.search(r"error: .*out: (differs|is damaged).*\n.*__0_1\.distcp: ", capsys.readouterr().err)


def test_failures_are_one_message_and_a_code(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to_mcore", "--model", str(tmp_path), "--output_dir", str(tmp_path / "o")]) == 1
    assert re.fullmatch(r"error: .*config\.json: cannot be read: No such file.*\n", capsys.readouterr().err)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["--to_mcore", "--model", str(hf), "--output_dir", str(blocked / "o")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--to_mcore", "--model", str(hf), "--output_dir", str(blocked)]) == 1
    assert "exists and is no folder" in capsys.readouterr().err


def test_only_tasks_of_srun_share_the_work() -> None:
    from megabatch.converters.conversion import place

    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1, "")
    task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
    assert place(task) == (3, 8, "")
    step = {**task, "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1"}
    assert place(step) == (3, 8, "5.1.0")
    assert place({**step, "SLURM_RESTART_COUNT": "2"}) == (3, 8, "5.1.2")  # a requeued job numbers its steps anew
    assert place({}) == (0, 1, "")
    for odd in ({"SLURM_STEP_NUM_TASKS": "8"}, {"SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "0"}):
        with pytest.raises(ConversionError, match="do not describe a rank; give --rank and --world"):
            place(odd)


def test_exist_ok_replaces_an_output_of_the_same_source_too(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--to_mcore", "--model", str(hf), "--output_dir", str(out), "--exist_ok"]
    assert main(given) == 0
    whole = contents(out)
    with open(out / "release" / "__0_1.distcp", "r+b") as file:
        file.seek(5000)
        file.write(b"0123456789")
    (out / "more").write_text("")
    assert main(given) == 0
    assert contents(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_outputs_that_cannot_be_are_refused_and_nothing_is_left(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for output, message in ((str(link), "a link to nowhere, which is not there"), ("/", "no folder that can be made")):
        assert main(["--to_mcore", "--model", str(hf), "--output_dir", output]) == 1
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["link"]
