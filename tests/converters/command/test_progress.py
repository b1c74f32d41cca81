"""What is shown while a conversion runs: a bar on a terminal, lines elsewhere, totals first in a dry run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabatch.converters.command import main
from megabatch.converters.command.progress import Progress
from megabatch.converters.command.report import left_aside

Saved = Callable[[str], Path]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(out: io.StringIO, steps: list[tuple[float, str, int]]) -> str:
    clock = Clock()
    progress = Progress(4_000_000, out, clock=clock)
    for now, what, size in steps:
        clock.now = now
        progress(what, size)
    progress.close()
    return out.getvalue()


STEPS = [
    (0.0, "written", 0), (1.0, "written", 1_000_000), (9.0, "written", 500_000), (10.0, "written", 500_000),
    (19.0, "written", 2_000_000), (20.0, "verified", 0), (40.0, "verified", 1_000_000),
]  # fmt: skip


def test_a_line_from_time_to_time() -> None:
    assert shown(io.StringIO(), STEPS) == (
        "written 50 %, 2.00 MB of 4.00 MB, 0:10 left\nverified 25 %, 1.00 MB of 4.00 MB, 1:00 left\n"
    )


def test_a_bar_on_a_terminal() -> None:
    text = shown(Terminal(), STEPS)
    assert "\n" not in text
    assert "\r[######                  ] written 25 %, 1.00 MB of 4.00 MB, 0:03 left" in text
    assert "\r[########################] written 100 %, 4.00 MB of 4.00 MB, 0:00 left" in text
    assert text.endswith("\r")


def test_nothing_to_write_is_all_of_it() -> None:
    clock = Clock()
    out = io.StringIO()
    progress = Progress(0, out, clock=clock, every=0.0)
    progress("written", 0)
    assert out.getvalue() == "written 100 %, 0 B of 0 B, 0:00 left\n"


def test_what_is_left_aside_is_grouped() -> None:
    names = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "computed" for layer in range(61)}
    assert list(left_aside({**names, "lm_head.weight": "it repeats another"})) == [
        "skipped: model.layers.*.self_attn.rotary_emb.inv_freq (61 tensors): computed",
        "skipped: lm_head.weight: it repeats another",
    ]


def test_a_dry_run_begins_with_the_totals(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to_mcore", "--model", str(saved("qwen3")), "--output_dir", str(tmp_path / "o"), "--dry_run"]) == 0
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert " tensors of " in first
    assert " bytes of disk space are needed, " in second
    assert third.startswith("release/__0_0.distcp: ")


@pytest.mark.parametrize("flags", [["--help"], []])
def test_a_reader_that_leaves_costs_no_traceback(flags: list[str]) -> None:
    """The pipe has no reader any more when the first line is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megabatch.converters.command", *flags]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_the_output_is_a_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megabatch.converters.command", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_folders_of_another_kind_name_the_right_flag(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, mcore, out = str(saved("qwen3")), str(tmp_path / "mcore"), ["--output_dir", str(tmp_path / "out")]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert main(["--to_mcore", "--model", model, "--output_dir", mcore]) == 0
    wrong = [
        (["--to_mcore", "--model", mcore], "is a checkpoint of megatron-core, not the folder of a Hugging Face model; "
         "name it as --mcore_model, with --to_hf"),
        (["--to_hf", "--mcore_model", model], "is the folder of a Hugging Face model, not a checkpoint of "
         "megatron-core; name it as --model"),
        (["--to_hf", "--adapters", model], "is the folder of a Hugging Face model, not an adapter; name it as "
         "--model"),
        (["--to_mcore", "--model", str(adapter)], "is an adapter, not the folder of a Hugging Face model; name it as "
         "--adapters"),
        (["--to_hf", "--mcore_model", str(adapter)], "is an adapter, not a checkpoint of megatron-core; name it as"),
        (["--to_hf", "--model", mcore, "--torch_dtype", "float16"], "is a checkpoint of megatron-core, not"),
    ]  # fmt: skip
    for flags, message in wrong:
        assert main([*flags, *out]) == 1
        assert message in capsys.readouterr().err, flags
