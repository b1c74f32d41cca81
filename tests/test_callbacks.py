"""Callbacks as a user names them: loaded, or refused with the line and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabatch.callbacks import load
from megabatch.errors import ConfigError
from megabatch.user_code import archived, files_to_archive

GOOD = """
class Report:
    def on_step(self, step, metrics):
        self.seen = (step, metrics)

class Partly:
    def on_save(self, *, step, path): ...
"""


@pytest.mark.parametrize(
    ("text", "source", "said"),
    [
        ("a.py", GOOD, "must be a Python file and a class in it, such as callbacks.py:Report"),
        ("a.py:Report", None, "a.py does not exist; check the path"),
        ("a.py:Repor", GOOD, "has no class Repor; did you mean Report?"),
        (
            "a.py:A",
            "class A:\n    def on_stpe(self, step, metrics): ...",
            "on_stpe is never called; did you mean on_step?",
        ),
        ("a.py:A", "class A:\n    def on_step(self): ...", "A.on_step must take the keywords step, metrics"),
        ("a.py:A", "class A: ...", "A has none of the methods on_step, on_evaluate, on_save, on_end"),
        ("a.py:A", "x = 1\ny = x / 0", "a.py:2: ZeroDivisionError: division by zero"),
        ("a.py:A", "class A\n", "a.py:1: "),
        ("a.py:A", "class A:\n    def __init__(self, n): ...", "A() cannot be made: "),
    ],
)
def test_what_cannot_work_is_refused(
    text: str, source: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source is not None:
        (tmp_path / "a.py").write_text(source)
    with pytest.raises(ConfigError) as raised:
        load(text)
    assert said in str(raised.value)


def test_a_class_with_some_hooks_is_made(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(GOOD)
    report = load(f"{file}:Report")
    report.on_step(step=1, metrics={})
    assert report.seen == (1, {}) and load(f"{file}:Partly")


def test_a_snapshot_holds_each_file_under_a_name_of_its_own(tmp_path: Path) -> None:
    files = [tmp_path / folder / "a.py" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text(GOOD)
    found = files_to_archive([f"{file}:Report" for file in files] + [f"{tmp_path}/missing.py:A"])
    assert found == {archived(file): file for file in files} and len(found) == 2
