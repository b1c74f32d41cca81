"""Stands in for nvidia-smi where there is no GPU: answers its documented CSV queries from a file for each node.

`FOLDER/<node>.json` may hold `gpus` (default 2), `exit` (code of every call), `unknown` (fields of another driver) and
`values` (what fields of GPU 0 say instead of what a healthy GPU's do).
"""

import json
import os
import sys
from pathlib import Path

HEALTHY = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory.used": "4",
    "ecc.errors.uncorrected.volatile.total": "0",
    "retired_pages.pending": "[N/A]",
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
}


def main() -> int:
    path = Path(__file__).parent / f"{os.environ['SLURMD_NODENAME']}.json"
    node = json.loads(path.read_text()) if path.exists() else {}
    if node.get("exit"):
        print("Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error")
        return int(node["exit"])
    query = next(word for word in sys.argv if word.startswith("--query"))
    assert "--format=csv,noheader,nounits" in sys.argv
    fields = query.split("=", 1)[1].split(",")
    for field in fields:
        if field in node.get("unknown", ()):
            print(f'Field "{field}" is not a valid field to query.', file=sys.stderr)
            return 2
    for index in range(node.get("gpus", 2)):
        known = HEALTHY | {"index": str(index), "uuid": f"GPU-{index}", "gpu_uuid": f"GPU-{index}"}
        known |= node.get("values", {}) if index == 0 else {}
        print(", ".join(known.get(field, "Not Active") for field in fields))
    return 0


if __name__ == "__main__":
    sys.exit(main())
