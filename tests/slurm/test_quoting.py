"""Random text through bash itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.errors import LaunchError
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile, Container
from megabatch.slurm.quoting import shell
from megabatch.slurm.render import render

PIECES = st.sampled_from(
    ["'", '"', "\\", "$", "$(touch ran)", "`touch ran`", "${HOME}", "$'", "\n", "\r", "\t", "\x1b", "\x7f", " ", "-n",
     "--", "%j", "%%", "#", "!", "!!", "~", "*", "?", "[a]", "{a,b}", ";", "&", "|", ">", "<", "(", ")", "=", "é",
     "漢", "\u2028", "\U0001f600", "x", "\\x41", "\\n", "EOF", "RANK", "\nRANK\n", "\udcff"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12).map("".join)


def bash(script: str, folder: Path) -> bytes:
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e"], input=script.encode(errors="surrogateescape"), cwd=folder,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(TEXTS, min_size=1, max_size=30))
def test_bash_reads_every_word_back(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    words = [shell(text) for text in texts]
    assert not any("\n" in word for word in words)
    said = bash("".join(f"x={word}; printf '%s\\0' \"$x\"; printf '%s\\0' {word}\n" for word in words), folder)
    expected = [os.fsencode(text) for text in texts for _ in range(2)]
    assert said.split(b"\0")[:-1] == expected
    assert not (folder / "ran").exists()


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(TEXTS, min_size=8, max_size=8), runtime=st.sampled_from([None, "pyxis", "apptainer"]))
def test_a_script_of_random_text_is_bash_that_exports_exactly_it(
    texts: list[str], runtime: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Or is refused with one clear error, where Slurm's or the runtimes' own syntax cannot hold the text."""
    folder = tmp_path_factory.getbasetemp()
    name, value, module, image, python, cache, argument, last = texts
    container = None if runtime is None else Container(image=image, python=python, runtime=runtime)  # type: ignore[arg-type]
    job = JobSpec(
        name=name, run_directory=folder / "run", environment={"VALUE": value}, arguments=(argument,), preflight="light"
    )
    profile = ClusterProfile(modules=(module,), container=container, python=python, local_cache=cache, srun=(last,))
    try:
        script = render(job, profile)
    except LaunchError:
        return
    subprocess.run(["bash", "-n"], input=script.encode(errors="surrogateescape"), check=True)
    [line] = [line for line in script.split("\n") if line.startswith("export VALUE=")]
    assert bash(f'{line}\nprintf %s "$VALUE"\n', folder) == os.fsencode(value)
    assert not (folder / "ran").exists()
