"""Conversions killed at random calls to the system, resumed, killed again and resumed to the end.

    python tests/converters/engine/killing.py --kills 100 [--seed 0]

kills so many, dealt over the conversion modes; every output must have the bytes of an uninterrupted one, and must not
have its name before. `test_resume.py` does the same with fewer.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from made_folders import MOE, contents, make_folder

PROGRAM = """
import json, os, sys
from megabatch.converters.engine import execute
from megabatch.converters import ConversionRequest, convert
kill_at = int(sys.argv[1])
left = kill_at
def dying(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return call
for owner, name in ((os, "pwrite"), (os, "write"), (os, "fsync"), (os, "fdatasync"), (os, "rename"), (os, "replace"),
                    (os, "open"), (os, "ftruncate")):
    setattr(owner, name, dying(getattr(owner, name)))
execute.SYNC_BYTES = 40_000
given = json.loads(sys.argv[3])
verify = given.pop("verify", False)
convert(ConversionRequest(**given), output_dir=sys.argv[2], resume=True, exist_ok=True, verify=verify)
print(kill_at - left)
"""
NEVER = 1 << 30


def convert_until(kill_at: int, output: Path, **given: Any) -> subprocess.CompletedProcess[str]:
    """A process that converts and kills itself at its `kill_at`th call; when it ends by itself it prints how many it
    made."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    if given.get("to_hf"):
        arguments = {"max_shard_size": "100KB", **arguments}
    command = [sys.executable, "-c", PROGRAM, str(kill_at), str(output), json.dumps(arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass
class Killed:
    """What happened to one way of converting."""

    calls: int
    """To the system, of an uninterrupted conversion."""
    kills: int = 0
    resumed: int = 0
    """Conversions that were taken up, some twice."""
    faults: list[str] = field(default_factory=list)


def kill_and_resume(folder: Path, times: int, rng: random.Random, **given: Any) -> Killed:
    """Converts until `times` processes were killed, each conversion twice at most, and compares every output.

    Some kills come too late, because threads share their calls differently each time: those do not count.
    """
    done = convert_until(NEVER, folder / "whole", **given)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found, expected, number = Killed(int(done.stdout)), contents(folder / "whole"), 0
    while found.kills < times:
        number += 1
        output = folder / str(number)
        for place in (rng.randrange(1, found.calls), rng.randrange(2, found.calls)):
            if found.kills < times:
                found.kills += convert_until(place, output, **given).returncode == -9
                found.resumed += 1
            if output.exists() and contents(output) != expected:
                found.faults.append(f"{output}: had its name before it was whole, killed at call {place}")
        done = convert_until(NEVER, output, **given)
        if done.returncode or contents(output) != expected:
            found.faults.append(f"{output}: differs {done.stderr[-300:]}")
        if output.with_name(f".{output.name}.partial").exists():
            found.faults.append(f"{output}: what was staged is still there")
    return found


def ways(folder: Path) -> dict[str, dict[str, Any]]:
    """The ways of converting one small model, by name."""
    hf, mcore, fp8 = make_folder(folder / "hf", MOE), folder / "mcore", folder / "fp8"
    for output, given in ((mcore, {"to_mcore": True, "model": hf}),
                          (fp8, {"to_hf": True, "model": hf, "fp8_quantise": True})):  # fmt: skip
        done = convert_until(NEVER, output, **given)
        if done.returncode:
            raise RuntimeError(done.stderr)
    return {
        "to_mcore": {"to_mcore": True, "model": hf},
        "to_mcore, verified": {"to_mcore": True, "model": hf, "verify": True},
        "to_mcore from FP8": {"to_mcore": True, "model": fp8},
        "to_hf": {"to_hf": True, "mcore_model": mcore},
        "to_hf in FP8": {"to_hf": True, "mcore_model": mcore, "fp8_quantise": True},
        "written anew, fused": {"to_hf": True, "model": hf, "expert_layout": "fused"},
        "in other shards": {"to_hf": True, "model": fp8, "max_shard_size": "30KB"},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        named = ways(Path(name))
        for number, (title, given) in enumerate(named.items()):
            times = asked.kills // len(named) + (number < asked.kills % len(named))
            place = Path(name) / f"way-{number}"
            place.mkdir()
            found = kill_and_resume(place, times, random.Random(f"{asked.seed} {title}"), **given)
            faults += len(found.faults)
            print(
                f"{title:22} {found.kills:4} kills among {found.calls} calls, {len(found.faults)} faults", flush=True
            )
            print("".join(f"  {fault}\n" for fault in found.faults), end="")
    print(f"seed {asked.seed}: {asked.kills} kills, {'every output identical' if not faults else f'{faults} FAULTS'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
