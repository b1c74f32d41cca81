"""Plans the same Hugging Face tensors in other files: copies every tensor unchanged, whatever its model and dtype."""

from __future__ import annotations

import os
from pathlib import Path

from megabatch.converters.engine.plan import Numbered, Plan, uncollected
from megabatch.converters.hf_model import read_config
from megabatch.converters.hf_output import plan_files, whole_tensor
from megabatch.converters.safetensors_io import HfFolder


@uncollected()
def plan_reshard(hf_folder: str | os.PathLike[str], *, max_shard_size: str | int | None) -> Plan:
    """Plans the folder without using a family, so that FP8, fused experts and models without a table stay unchanged.

    Raises: ConversionError for a folder that cannot be read, before anything is written.
    """
    read_config(hf_folder)  # without it there is no model in the folder
    numbered = Numbered()
    with HfFolder(hf_folder) as folder:
        parts = {name: [whole_tensor(folder, name, numbered)] for name in folder.names}
        entries = folder.tensors
    return plan_files(
        "to_hf",
        Path(hf_folder),
        entries=entries,
        parts=parts,
        numbered=numbered,
        reference=Path(hf_folder),
        max_shard_size=max_shard_size,
    )
