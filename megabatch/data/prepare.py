"""Makes a run's token caches before it is queued: `python -m megabatch.data.prepare RUN_JSON`; needs no torch."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.reference_log_probs import log_probs_file
from megabatch.data.run_caches import build_caches, course, note_data, open_caches, schedule_of, train_iters
from megabatch.data.run_tokenizer import tokenizer_of
from megabatch.data.tokens.auto_tokenizer import import_without_torch
from megabatch.data.whole_data import require_contrast
from megabatch.errors import ConfigError, DataError, MegabatchError
from megabatch.run_directory import ExitCode


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 if the caches exist now, 2 for an error in data or settings, else 1."""
    if len(arguments) != 1:
        print("usage: python -m megabatch.data.prepare RUN_JSON", file=sys.stderr)
        return ExitCode.CONFIG
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("megabatch").setLevel(logging.INFO)
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # no warning that torch is missing
    import_without_torch()
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
    data, validation = open_caches(run, paths)
    require_contrast(run, data)
    schedule = schedule_of(run, data)
    schedule.require_a_batch()
    note_data(run, data, schedule)
    steps = train_iters(run, schedule)
    lines = [f"training data    {paths.train}"]
    if paths.validation:
        lines.append(f"validation data  {paths.validation}")
    if run.recipe.rlhf.precompute_ref_log_probs:
        lines.append(f"reference        {_reference(run, [part for part in (data, validation) if part is not None])}")
    return "\n".join([*lines, f"length           {steps:,} steps; {course(schedule, data, steps)}"])


def _reference(run: RunConfig, parts: Sequence[TokenCache]) -> str:
    """What is known of the reference's log-probabilities, which the ranks of the run compute."""
    files = [log_probs_file(run, part) for part in parts]
    missing = sum(len(part) for part, file in zip(parts, files, strict=True) if not file.exists())
    if not missing:
        return f"{files[0].parent}: log-probabilities of all samples"
    return f"the log-probabilities of {missing:,} samples are computed by the ranks before the first step"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
