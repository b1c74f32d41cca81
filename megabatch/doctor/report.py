"""`megabatch doctor`: what this machine or a cluster has, what works without the rest, how to fix each failure."""

from __future__ import annotations

import json
import textwrap

from megabatch.doctor.checks import examine
from megabatch.doctor.cluster import examine_cluster
from megabatch.doctor.finding import Finding
from megabatch.doctor.site import examine_site
from megabatch.slurm.profile import load_profile
from megabatch.table import table

_SHOWN = {"ok": "ok", "missing": "-", "unsupported": "VERSION", "broken": "BROKEN"}


def show_report(*, as_json: bool, cluster: str | None = None, run: bool = False) -> int:
    """Prints the findings; 1 when something that this machine, or a profile's cluster, needs is missing or broken.

    Args: `cluster` names a profile to compare with the live cluster; `run` also starts a short job there.
    Raises: ConfigError for a profile that cannot be read.
    """
    findings = examine() if cluster is None else _examine_profile(cluster, run=run)
    failed = [finding for finding in findings if finding.needed]
    if as_json:
        plain = [{name: getattr(one, name) for name in one.__slots__} for one in findings]
        print(json.dumps({"ok": not failed, "findings": plain}, indent=2))
    else:
        print(_text(findings, failed))
    return 1 if failed else 0


def _examine_profile(cluster: str, *, run: bool) -> list[Finding]:
    profile = load_profile(cluster)
    return [*examine_cluster(profile), *examine_site(profile, run=run)]


def _text(findings: list[Finding], failed: list[Finding]) -> str:
    rows = [
        (one.name, "MISSING" if one.needed and one.state == "missing" else _SHOWN[one.state], one.found, one.supported)
        for one in findings
    ]
    parts = [table(("", "", "FOUND", "SUPPORTED"), rows)]
    faulty = {(one.found, one.without, one.fix): one for one in findings if one.state != "ok"}
    for alike, one in faulty.items():
        names = ", ".join(other.name for other in findings if (other.found, other.without, other.fix) == alike)
        parts.append(f"\n{names}: {one.found or 'not found'}")
        if one.without:
            parts.append(_indented(f"without it: {one.without}"))
        if one.fix:
            parts.append(_indented(f"fix: {one.fix}"))
    names = ", ".join(one.name for one in failed)
    parts.append(f"\n{names} must be fixed" if failed else "\nthis machine has everything that it needs")
    return "\n".join(parts)


def _indented(text: str) -> str:
    return textwrap.fill(
        text, width=110, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
