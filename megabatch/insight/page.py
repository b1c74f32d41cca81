"""The frame of a report: one HTML file that needs nothing else, in light and dark. All text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_LIGHT = ("#0072b2", "#b95000", "#007a5e", "#a8518a", "#8a6d00", "#2b6f8f", "#7a4b1f", "#4a4a4a")
_DARK = ("#56b4e9", "#ff9e4a", "#3ddbab", "#f0a0d0", "#f0e442", "#8fd0ff", "#d9a877", "#c8c8c8")
"""Contrast of at least 4.5 : 1 with the page, as WCAG 2.2 requires for text; runs have numbers besides colours."""


def _colours(values: Sequence[str]) -> str:
    return "".join(f"--s{index}:{value};" for index, value in enumerate(values))


STYLE = (
    f":root{{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#57606a;--grid:#d8dee4;{_colours(_LIGHT)}"
    "--done:#007a5e;--saved:#0072b2;--failed:#b3261e;--running:#8a6d00}"
    f"@media(prefers-color-scheme:dark){{:root{{--page:#14171a;--text:#e6e8ea;--soft:#a3abb3;--grid:#343a40;"
    f"{_colours(_DARK)}--done:#3ddbab;--saved:#56b4e9;--failed:#ff8a80;--running:#f0e442}}}}"
    "*{box-sizing:border-box}body{background:var(--page);color:var(--text);font:15px/1.45 system-ui,sans-serif;"
    "margin:0 auto;max-width:1360px;padding:16px}h1{font-size:1.4em}h2{font-size:1.1em;margin:1.6em 0 .4em}"
    ".charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}"
    "figure{margin:0;max-width:660px}figcaption{font-weight:600}svg{width:100%;height:auto;display:block}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse}th,td{text-align:left;padding:3px 12px 3px 0;"
    "border-bottom:1px solid var(--grid);vertical-align:top}th{color:var(--soft);font-weight:600}"
    "pre{overflow-x:auto;background:color-mix(in srgb,var(--text) 6%,transparent);padding:8px;font-size:13px}"
    ".soft{color:var(--soft)}.key{display:inline-block;width:1.6em;height:0;border-top:3px solid;"
    "vertical-align:middle;margin-right:.4em}.t{font-size:12px;fill:var(--soft)}.m{text-anchor:middle}.e{text-anchor:end}"
    ".g{stroke:var(--grid);stroke-width:1}.l{fill:none;stroke-width:1.6;stroke-linejoin:round}"
    + "".join(f".s{i}{{stroke:var(--s{i});border-color:var(--s{i})}}.d.s{i}{{fill:var(--s{i})}}" for i in range(8))
    + "".join(f".{name}{{fill:var(--{name});color:var(--{name})}}" for name in ("done", "saved", "failed", "running"))
)


def page(title: str, body: str) -> str:
    """A complete document that cannot load or run anything, whatever `body` contains."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """A table; cells are text and get escaped."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table aria-label="{escape(caption, quote=True)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" if svg else ""


def section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def lines(text: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(text))}</pre>" if text else ""


def paragraph(text: str, *, soft: bool = False) -> str:
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def legend(labels: Sequence[str]) -> str:
    """The runs by number, each with the colour of its lines."""
    keys = (
        f'<div><span class="key s{index % 8}"></span>{index + 1} {escape(label)}</div>'
        for index, label in enumerate(labels)
    )
    return "".join(keys)
