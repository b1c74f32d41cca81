"""Which nodes a run's next job avoids, and how they are described."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megabatch.run_directory import RunDirectory
from megabatch.slurm.bad_nodes import avoided, describe, exclude_option, read_bad_nodes
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.render import render

from .conftest import payload_spec


def found(run: RunDirectory, node: str, check: str = "ecc", *, hours_ago: float = 0, excluded: bool = True) -> None:
    words = {"time": time.time() - 3600 * hours_ago, "job_id": "7", "attempt": 0, "node": node, "check": check}
    with open(run.bad_nodes, "a") as file:
        file.write(json.dumps(words | {"value": "3", "rule": "0", "excluded": excluded}) + "\n")


def test_what_was_left_out_within_a_day_is_avoided(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert avoided([run]) == [] and describe(read_bad_nodes(run)) == ""
    found(run, "n3", hours_ago=23)
    found(run, "n1")
    found(run, "n1", "link")
    found(run, "n2", hours_ago=25)
    found(run, "n4", excluded=False)
    run.bad_nodes.write_text(run.bad_nodes.read_text() + '{"time": 1, "no')
    assert avoided([run]) == ["n1", "n3"]
    assert describe(read_bad_nodes(run)) == "without n3 (ecc), n1 (ecc, link), n2 (ecc); bad: n4 (ecc)"


def test_the_scripts_own_list_stays(tmp_path: Path) -> None:
    for own, expected in ((None, "n1"), ("n4", "n4,n1"), ("n[6-8],m 1", "n[6-8],m 1,n1")):
        script = render(payload_spec(tmp_path), ClusterProfile(exclude=own))
        assert exclude_option(script, ["n1"]) == (f"--exclude={expected}",)
        assert exclude_option(script, []) == ()
