"""Stands in for the trainer on the private Slurm: says what it sees, stops on request, fails on demand.

Arguments are `key=value`: `seconds` to run, `until_attempt` (runs on before that attempt, then ends well),
`fail_rank`, `fail` (an exit code, `kill`, or `hang`), `fail_until` (fails before that attempt only), `save_until`
(makes a checkpoint first before that attempt), `deaf` (does not listen: `asked`, until the run is asked to stop;
else for ever), `meet` (a file where rank 0 writes who reached it).
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

options = dict(argument.split("=", 1) for argument in sys.argv[1:])
rank, attempt = int(os.environ["RANK"]), int(os.environ["MEGABATCH_ATTEMPT"])
asked = []


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def meet(path: str) -> None:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        while True:
            try:
                socket.create_connection((address, port), timeout=300).sendall(str(rank).encode())
                return
            except ConnectionRefusedError:
                time.sleep(0.05)  # rank 0 does not listen yet
    with socket.create_server(("", port)) as server:
        server.settimeout(300)
        ranks = sorted(int(server.accept()[0].recv(16)) for _ in range(int(os.environ["WORLD_SIZE"]) - 1))
    with open(path, "w") as file:
        json.dump(ranks, file)


fails = rank == int(options.get("fail_rank", -1)) and attempt < int(options.get("fail_until", 1000))
while "deaf" in options and not fails:
    time.sleep(0.05)
    if options["deaf"] == "asked" and os.path.exists(os.environ["MEGABATCH_STOP_REQUEST"]):
        break
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
if os.path.exists(os.environ["MEGABATCH_STOP_REQUEST"]):
    asked.append("file")
say(argv=sys.argv[1:], environment=dict(os.environ), cwd=os.getcwd())
signal.signal(signal.SIGUSR1, lambda number, frame: print(f"rank {rank} is at step 7, training, for 1 s", flush=True))
if rank == 0:
    Path(os.environ["MEGABATCH_RUN"], "heartbeat.json").write_text(
        json.dumps({"state": "running", "time": time.time()})
    )
    if attempt < int(options.get("save_until", 0)):
        latest = Path(os.environ["MEGABATCH_RUN"], "checkpoints", "latest")
        latest.parent.mkdir(exist_ok=True)
        latest.write_text(f"step_{attempt:08d}\n")
if "meet" in options:
    meet(options["meet"])
if fails:
    # the others come as far as they can first
    time.sleep(0.3 if options["fail"] == "kill" else 0)
    if options["fail"] in ("kill", "hang"):
        os.kill(os.getpid(), signal.SIGSTOP if options["fail"] == "hang" else signal.SIGKILL)
    sys.exit(int(options["fail"]))
end = time.monotonic() + float(options.get("seconds", 0))
while attempt < int(options.get("until_attempt", 0)) or time.monotonic() < end:
    time.sleep(0.05)
    if asked:
        # ranks do not leave together: the last one still closes its files
        time.sleep(0.3 * (rank % 2))
        say(stopped=asked[0])
        os._exit(75)  # Python takes its handlers away as it ends, and the next signal would kill it
say(done=True)
