"""Stands in for Python and the trainer where a test is about the launcher: `stand_in.py -P -m MODULE RUN_DIRECTORY`.

A run whose name stands in the sweep's file `.slow` waits until it is told to stop or killed; with a file `.deaf`,
until it is killed. Others end well at once.
Each writes what a trainer leaves of its last step.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run = Path(sys.argv[-1])
recipe = json.loads((run / "run.json").read_text())["recipe"]
asked = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
if os.environ["RANK"] == "0":
    slow = run.parent / ".slow"
    (run / f"pid.{os.environ['MEGABATCH_ATTEMPT']}").write_text(str(os.getpid()))
    (run / "heartbeat.json").write_text(json.dumps({"time": time.time(), "state": "running"}))
    while slow.exists() and run.name in slow.read_text().split():
        time.sleep(0.05)
        if asked and not slow.with_name(".deaf").exists():
            os._exit(75)  # Python takes its handlers away as it ends, and the next signal would kill it
    seed, lr = recipe["training"]["seed"], recipe["learning_rate"]["lr"]
    line = {"kind": "train", "step": 3, "loss_sum": 2 * seed, "loss_count": 2, "tokens_per_s": 1000 * lr + seed}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line | {"memory_gib": 0.5}) + "\n")
    beat = {"time": time.time(), "state": "done", "step": 3, "job_id": os.environ.get("MEGABATCH_JOB_ID")}
    (run / "heartbeat.json").write_text(json.dumps(beat))
