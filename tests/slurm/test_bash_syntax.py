"""A profile's `setup`: what would swallow the rest of a job script is refused by line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megabatch.errors import ConfigError
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import load_profile
from megabatch.slurm.render import render

OPEN = [
    'echo "x', "echo it's", "cat <<EOF", "cat <<'END OF'", "echo \\", "export A=1 \\", "if true; then", "fi",
    "false &&", "echo $(true", "echo `true", "echo ${x", "a() {", "{ true", "case x in", "((1 +", "x=(a", "true; )",
    "for x in a; do", "while true", "[[ a", 'echo "a" "', "cat <<EOF\nEOF ", "function", "echo $'a\\'", "true || \\",
]  # fmt: skip
WHOLE = [
    "# it's \\", "true", "", "cat <<EOF\nit's\nEOF", "if true; then\ntrue\nfi", 'echo "a\nb"', "true &",
    "a() { true; }", "shopt -s extglob\necho !(x)", "echo fi", "echo \\\\", "[[ -e /x && -n $A ]] || true", "exit 3",
    "true # \\", "eval \"$(true)\"", "echo '\\'", "source /dev/null || true", "for x in a b; do echo \"$x\"; done",
]  # fmt: skip


def profile(folder: Path, *lines: str) -> Path:
    path = folder / "site.toml"
    words = ", ".join(
        '"' + line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"' for line in lines
    )
    path.write_text(f"setup = [{words}]\n")
    return path


@pytest.mark.parametrize("line", OPEN)
def test_what_does_not_end_is_refused_by_its_line(line: str, tmp_path: Path) -> None:
    for before, after in (((), ()), (("true", "echo"), ()), (("if true; then", "true", "fi"), ())):
        path = profile(tmp_path, *before, line, *after)
        with pytest.raises(ConfigError) as caught:
            load_profile(str(path))
        said = str(caught.value)
        assert said.startswith(f"1 fault, nothing was started\n  cluster.setup[{len(before)}]=")
        assert said.count("\n") == 1
        assert f" in {path}: " in said and "the rest of the job script would not run" in said


@pytest.mark.parametrize("line", WHOLE)
def test_what_ends_is_left_as_it_is(line: str, tmp_path: Path) -> None:
    for lines in ((line,), ("true", line), (line, line)):
        assert load_profile(str(profile(tmp_path, *lines))).setup == lines


@pytest.mark.parametrize("line", [*OPEN, *WHOLE])
def test_bash_itself_agrees(line: str, tmp_path: Path) -> None:
    """A line is refused exactly where a command after it does not run as it stands."""
    script = f"{line}\n(exit 3)\n"
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 3) == (line in WHOLE)


def test_several_lines_may_be_one_command(tmp_path: Path) -> None:
    lines = (
        "if [ -e /opt/site ]; then",
        "    . /opt/site",
        "fi",
        "export A=1 \\",
        "    B=2",
        "cat <<EOF",
        "it's",
        "EOF",
    )
    assert load_profile(str(profile(tmp_path, *lines))).setup == lines
    with pytest.raises(ConfigError, match=r"cluster.setup\[3\]='export A=1 "):
        load_profile(str(profile(tmp_path, *lines[:4])))


def test_nul_characters_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('setup = ["true", "echo \\u0000"]\n')
    with pytest.raises(ConfigError, match=r"cluster.setup\[1\].*NUL"):
        load_profile(str(path))


def test_without_bash_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_profile(str(profile(tmp_path, 'echo "x'))).setup == ('echo "x',)


def test_words_of_a_profile_that_look_like_the_scripts_own_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('srun = ["$rank_script", "--nodelist=$rank_nodes"]\nmodules = ["a; b", "c\\nd"]\n')
    script = render(JobSpec(name="j", run_directory=Path("/j")), load_profile(str(path)))
    assert "'$rank_script' '--nodelist=$rank_nodes' bash -c \"$rank_script\" rank" in script
    assert "\nmodule load 'a; b' $'c\\x0ad'\n" in script
