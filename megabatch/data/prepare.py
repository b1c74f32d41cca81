"""Makes a run's token caches before it is queued: `python -m megabatch.data.prepare RUN_JSON`; needs no torch."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.data.run_caches import build_caches, course, note_data, open_caches, schedule_of, train_iters
from megabatch.data.run_tokenizer import tokenizer_of
from megabatch.errors import ConfigError, DataError, MegabatchError
from megabatch.run_directory import ExitCode


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 if the caches exist now, 2 for an error in data or settings, else 1."""
    if len(arguments) != 1:
        print("usage: python -m megabatch.data.prepare RUN_JSON", file=sys.stderr)
        return ExitCode.CONFIG
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("megabatch").setLevel(logging.INFO)
    try:
        print(prepare(RunConfig.load(Path(arguments[0]))))
    except MegabatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CONFIG if isinstance(error, ConfigError | DataError) else ExitCode.FAILED
    return ExitCode.DONE


def prepare(run: RunConfig) -> str:
    """Builds the caches; returns where they are and how long the run is, in words. Raises: MegabatchError."""
    if run.recipe.data.streaming:
        raise ConfigError("data.streaming=True tokenises data while the run trains: there is nothing to prepare")
    paths = build_caches(run, tokenizer_of(run))
    data, _ = open_caches(run, paths)
    schedule = schedule_of(run, data)
    schedule.require_a_batch()
    note_data(run, data, schedule)
    steps = train_iters(run, schedule)
    lines = [f"training data    {paths.train}"]
    if paths.validation:
        lines.append(f"validation data  {paths.validation}")
    return "\n".join([*lines, f"length           {steps:,} steps; {course(schedule, data, steps)}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
