"""One rank of an evaluation: `python -m megabatch.trainer.evaluate RUN_DIR`, started by `megabatch evaluate`.

The run directory's `run.json` says what is evaluated and at which layout; the main rank writes `evaluation.json`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.trainer import failures
from megabatch.trainer.activity import Activity
from megabatch.trainer.main import configure_logging, prepare_device


def main(arguments: list[str]) -> int:
    """Exit status of the rank; see `ExitCode`."""
    activity = Activity(int(os.environ.get("RANK", "0")))
    activity.listen()
    if len(arguments) != 1:
        print("usage: python -m megabatch.trainer.evaluate RUN_DIR", file=sys.stderr)
        return ExitCode.CONFIG
    try:
        run = RunConfig.load(RunDirectory(Path(arguments[0])).run_json)
        configure_logging(run)
        prepare_device(run)
        from megabatch.trainer.evaluating import evaluate

        return evaluate(run, activity)
    except Exception as e:
        return failures.report(e)


if __name__ == "__main__":
    status = int(main(sys.argv[1:]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of gloo and of data workers must not hold up a rank that is done
