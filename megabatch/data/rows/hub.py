"""Datasets by name from the Hugging Face Hub or ModelScope."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from megabatch.data.rows.files import Origin, Row, without_nulls
from megabatch.errors import DataError


def rows(hub: str, name: str) -> Iterator[Row]:
    """Rows of `org/name[:subset[:split]]`; the split is `train` unless named. Raises DataError when out of reach."""
    for number, fields in enumerate(_load(hub, name)):
        yield Row(Origin(f"{hub}::{name}", number, is_line=False), without_nulls(dict(fields)))


def fingerprint(hub: str, name: str) -> str:
    """Identity of the downloaded content."""
    data = _load(hub, name)
    return f"{hub}::{name}:{getattr(data, '_fingerprint', len(data))}"


@lru_cache(maxsize=8)
def _load(hub: str, name: str) -> Any:
    path, _, rest = name.partition(":")
    subset, _, split = rest.partition(":")
    load = _hugging_face if hub == "hf" else _modelscope
    try:
        return load(path, subset or None, split or "train")
    except DataError:
        raise
    except Exception as e:  # the hub clients raise dozens of unrelated types (HTTP, cache, schema, config)
        reason = (str(e).strip().splitlines() or [""])[0]
        raise DataError(
            f"dataset {hub}::{name}: cannot be loaded ({type(e).__name__}: {reason}); there is no local path {name!r} "
            f"either. Check the name and the network, or download it and give the path of its files"
        ) from e


def log_through_ours() -> None:
    """Hub clients print what they log through handlers of their own too, once imported; ours tells time and rank."""
    for client in ("huggingface_hub", "datasets"):
        logging.getLogger(client).handlers.clear()


def _hugging_face(path: str, subset: str | None, split: str) -> Any:
    import datasets

    log_through_ours()
    return datasets.load_dataset(path, subset, split=split)


def _modelscope(path: str, subset: str | None, split: str) -> Any:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as e:
        raise DataError(
            f"dataset ms::{path}: needs the modelscope package, which is not installed; pip install modelscope, "
            f"or use a dataset of the Hugging Face Hub: hf::{path} or bridge.use_hf=True"
        ) from e
    return MsDataset.load(path, subset_name=subset or "default", split=split).to_hf_dataset()
