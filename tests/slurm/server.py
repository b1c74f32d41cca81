"""A small real HTTP server, as a role: `/health` and `/square/N` for who knows the token.

Arguments are `key=value`: `ready_s` (seconds until `/health` answers 200), `dies_after` (squares until it dies, with
exit code 9), `dies_until` (only before that attempt), `exit` (an exit code to end with before it listens).
"""

import itertools
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

options = dict(argument.split("=", 1) for argument in sys.argv[1:])
token = os.environ["MEGABATCH_ROLE_TOKEN"]
began, squares = time.monotonic(), itertools.count(1)
dies = int(os.environ["MEGABATCH_ATTEMPT"]) < int(options.get("dies_until", 1000))
print("serving", os.environ["MEGABATCH_ROLE"], os.environ["MEGABATCH_ROLE_TASK"], "RANK" in os.environ, flush=True)
if "exit" in options:
    print("error: this server was told to fail", flush=True)
    sys.exit(int(options["exit"]))
print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ready = time.monotonic() - began >= float(options.get("ready_s", 0))
        allowed = self.headers["Authorization"] == f"Bearer {token}"
        code = 401 if not allowed else 200 if ready or self.path != "/health" else 503
        answer = str(int(self.path.rpartition("/")[2]) ** 2) if code == 200 and "square" in self.path else "-"
        self.send_response(code)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())
        if answer != "-" and next(squares) == int(options.get("dies_after", 0)) and dies:
            print("error: out of luck", flush=True)
            os._exit(9)


ThreadingHTTPServer(("", int(os.environ["MEGABATCH_ROLE_PORT"])), Handler).serve_forever()
