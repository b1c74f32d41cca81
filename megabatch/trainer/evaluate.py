"""One rank of an evaluation: `python -m megabatch.trainer.evaluate RUN_DIR`, started by `megabatch evaluate`.

The run directory's `run.json` says what is evaluated and at which layout; the main rank writes `evaluation.json`.
"""

from __future__ import annotations

import sys

from megabatch.config.run import RunConfig
from megabatch.trainer.activity import Activity
from megabatch.trainer.main import as_rank, leave


def main(arguments: list[str]) -> int:
    """Exit status of the rank; see `ExitCode`."""

    def work(run: RunConfig, activity: Activity) -> int:
        from megabatch.trainer.evaluating import evaluate

        return evaluate(run, activity)

    return as_rank(arguments, work, module="megabatch.trainer.evaluate")


if __name__ == "__main__":
    leave(int(main(sys.argv[1:])))
