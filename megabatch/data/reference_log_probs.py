"""Where a run's stored log-probabilities of its reference are. Without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megabatch.config.run import RunConfig
from megabatch.data.cache.reference_key import reference_key
from megabatch.data.cache.token_cache import TokenCache
from megabatch.data.rows.digests import Digests
from megabatch.data.run_caches import cache_folder


def log_probs_file(run: RunConfig, data: TokenCache, *, busy: Callable[[], None] = lambda: None) -> Path:
    """The file for these samples, there or not; reads the reference's weights once. Raises: MegabatchError."""
    busy()
    digests = Digests(cache_folder(run))
    key = reference_key(run, data.content, digests=digests)
    digests.save()
    return cache_folder(run) / "reference" / f"{key}.f32"
