"""The doctor's text: one paragraph for what fails alike."""

from __future__ import annotations

import pytest

from megabatch.doctor import report
from megabatch.doctor.finding import Finding


def test_findings_with_the_same_fix_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"state": "missing", "without": "no training", "fix": "pip install 'megabatch[train]'"}
    findings = [
        Finding(name="torch", **absent),  # type: ignore[arg-type]
        Finding(name="Python", state="ok", found="3.11"),
        Finding(name="datasets", **absent),  # type: ignore[arg-type]
        Finding(name="apex", state="missing", without="slower"),
    ]
    monkeypatch.setattr(report, "examine", lambda: findings)
    assert report.show_report(as_json=False) == 0
    told = capsys.readouterr().out
    assert "\ntorch, datasets: not found\n  without it: no training\n  fix: pip install 'megabatch[train]'\n" in told
    assert told.count("no training") == 1 and "\napex: not found\n  without it: slower\n" in told
