"""Ranks that use the servers of a role: each asks every server for a square, then goes on until it is asked to stop.

Arguments are `key=value`: `seconds` to go on, `until_attempt` (goes on for ever before that attempt), `deaf` (never
stops when asked).
"""

import json
import os
import signal
import sys
import time
import urllib.request

options = dict(argument.split("=", 1) for argument in sys.argv[1:])
asked = []
signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
token, rank = os.environ["MEGABATCH_ROLE_TOKEN"], int(os.environ["RANK"])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
answers = []
for url in os.environ["MEGABATCH_ROLE_SERVER"].split(","):
    request = urllib.request.Request(f"{url}/square/{rank + 3}", headers={"Authorization": f"Bearer {token}"})
    with opener.open(request, timeout=300) as answer:
        answers.append(int(answer.read()))
names = ("SLURMD_NODENAME", "WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_NODES", "CUDA_VISIBLE_DEVICES")
print(json.dumps({"answers": answers} | {name: os.environ.get(name) for name in names}), flush=True)
end = time.monotonic() + float(options.get("seconds", 0))
lasts = int(os.environ["MEGABATCH_ATTEMPT"]) < int(options.get("until_attempt", 0))
while (lasts or time.monotonic() < end) and (not asked or "deaf" in options):
    time.sleep(0.05)
print(json.dumps({"stopped": bool(asked)}), flush=True)
sys.exit(75 if asked else 0)
