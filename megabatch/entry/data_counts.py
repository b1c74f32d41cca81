"""Where a run looks for its token cache, and the counts of its training data there."""

from __future__ import annotations

import os
from pathlib import Path

from megabatch.data.counts import NAME, DataCounts, recall_counts
from megabatch.entry.launch import Launch
from megabatch.errors import ConfigError
from megabatch.slurm.environment import job_variables

CACHE = "MEGABATCH_CACHE"


def cache_folder(launch: Launch) -> Path | None:
    """None if that is a folder of the run itself."""
    variables = {variable.name: variable.value for variable in job_variables(launch.job, launch.profile)}
    found = variables.get(CACHE) or os.environ.get(CACHE)
    return Path(found).expanduser().absolute() if found else None


def counts_of(launch: Launch) -> DataCounts | None:
    """What `megabatch prepare` or an earlier run counted for exactly this data; None if nothing has."""
    folder = cache_folder(launch)
    if folder is None or launch.model.shape is None or not (folder / NAME).is_file():
        return None
    try:
        return recall_counts(launch.config(provenance={}), folder)
    except ConfigError:
        return None  # of a recipe that cannot start yet
