"""Inputs that exist here but would be missing in the ranks' container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megabatch.config.several_teachers import models_named
from megabatch.data.rows import names
from megabatch.entry.launch import Launch
from megabatch.entry.paths import absolute_paths
from megabatch.errors import DataError, Fault
from megabatch.slurm.container import mounted


def unmounted(launch: Launch) -> list[Fault]:
    """Faults of inputs outside every mount; none without a container."""
    if launch.profile.container is None:
        return []
    folders = [Path(os.path.realpath(folder)) for folder in mounted(launch.job, launch.profile)]
    faults = []
    for field, path in _inputs(launch):
        inside = any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders)
        if path.exists() and not inside:
            rule = f"is not mounted in the container; add {str(path.parent)!r} to container.mounts of the profile"
            faults.append(Fault(field, str(path), rule))
    return faults


def _inputs(launch: Launch) -> Iterator[tuple[str, Path]]:
    recipe = absolute_paths(launch.recipe)
    named = [
        ("model.model", launch.model.folder),
        ("model.tokenizer", recipe.model.tokenizer),
        ("checkpoint.load", recipe.checkpoint.load),
        ("tuner.adapter_load", recipe.tuner.adapter_load),
        *(("gkd.teacher_model", name) for name in models_named(recipe.gkd.teacher_model)),
        ("bridge.ref_model", recipe.bridge.ref_model),
        ("rlhf.ref_load", recipe.rlhf.ref_load),
        ("rlhf.ref_adapter_load", recipe.rlhf.ref_adapter_load),
        *(("bridge.adapters", folder) for folder in recipe.bridge.adapters),
        *(("bridge.ref_adapters", folder) for folder in recipe.bridge.ref_adapters),
    ]
    yield from ((field, Path(path)) for field, path in named if path is not None and Path(path).is_absolute())
    for field in ("dataset", "val_dataset"):
        for text in getattr(recipe.data, field):
            try:
                name = names.parse(text, use_hf=recipe.bridge.use_hf)
                files = names.local_files(name) if name.kind == "path" else []
            except DataError:
                continue  # `missing_inputs` reports it
            yield from ((f"data.{field}", Path(path).absolute()) for path in files)
