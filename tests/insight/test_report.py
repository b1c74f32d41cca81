"""The page, as a real browser sees it."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megabatch.cli.command import main
from megabatch.insight.page import STYLE

from .made_run import MadeRun

HOSTILE = "</title><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\"'&"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run that was requeued and of one that failed, whose every text would like to be code."""
    monkeypatch.setenv("HF_TOKEN", "a very secret value")
    good = MadeRun.at(tmp_path / "good", learning_rate={"lr": 0.1})
    good.submitted()
    good.started(0, 1000)
    good.steps([(step, 2.0 * step) for step in range(1, 21)])
    good.ended(0, 75, 1100)
    good.started(1, 1200)
    good.steps([(step, 2.0 * step) for step in range(21, 3001)])
    good.ended(1, 0, 9000)
    bad = MadeRun.at(tmp_path / "bad<svg onload=x>", name=HOSTILE, learning_rate={"lr": HOSTILE})
    bad.submitted(HOSTILE)
    bad.started(0, 1000, job_id=HOSTILE, nodes=HOSTILE)
    bad.steps([(step, 1.0 * step) for step in range(1, 9)])
    bad.ended(0, 1, 1100, job_id=HOSTILE)
    bad.log(0, f"a very secret value\n{HOSTILE}\nValueError: {HOSTILE}\n")
    output = tmp_path / "report.html"
    assert main(["report", str(good.files.path), str(bad.files.path), "-o", str(output)]) == 0
    return output


class _Elements(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_it_is_one_small_file_with_nothing_to_run_or_load(page: Path) -> None:
    text = page.read_text()
    found = _Elements(text)
    assert not {"script", "img", "link", "iframe", "object", "a"} & set(found.names)
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert len(text) < 100_000, "3,000 steps are drawn by some hundred points"
    assert "a very secret value" not in text and "ValueError: &lt;/title&gt;" in text
    # five curves and a timeline for all, each with words for those who cannot see it
    assert found.names.count("svg") == found.names.count("desc") == 5
    assert [row for row in ("learning_rate.lr", "exit code 1", "saved and stopped") if row not in text] == []


def test_a_browser_shows_it_and_runs_nothing(page: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser here; on Debian: apt install --no-install-recommends chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1200,900", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1].startswith("Runs: made") and "owned" not in title[1].split("&lt;")[0]
    assert "<img" not in done.stdout and "onload" not in re.sub(r"&lt;.*?&gt;", "", done.stdout)
    assert done.stdout.count("<polyline") == 8 and done.stdout.count("<rect") == 3
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == [], "no script, style or picture was refused"


def _luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2; `#rgb` or `#rrggbb`."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_stand_out_from_the_page_in_both_settings() -> None:
    light, dark = (dict(re.findall(r"--(\w+):(#\w+)", block)) for block in STYLE.split("@media", 1))
    assert len(light) == len(dark) == 16
    for colours in (light, dark):
        page = _luminance(colours.pop("page"))
        del colours["grid"]
        for name, colour in colours.items():
            low, high = sorted((page, _luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colour)
