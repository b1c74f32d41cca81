"""Hugging Face export and file conversion against copying the same file; the converters need no torch.

Run by `run.py`: python tests/bench/convert.py FOLDER ANSWER
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from made_runs import SMALL, WEIGHTY, recipe, write_run
from measure import MIB, Figure, answer, bytes_below, copy_plain, median, peak_memory, seconds, sized

from megabatch.converters.safetensors_io import HfFolder
from megabatch.converters.to_hf import to_hf
from megabatch.converters.to_mcore import to_mcore
from megabatch.trainer import assemble
from megabatch.trainer.exports.hugging_face import HfExport
from megabatch.trainer.model.build import build, ddp_config
from megabatch.trainer.model.transformer_config import transformer_config
from megabatch.trainer.model_source import model_source

TIMES = sized(3, 1)


def figures(folder: Path) -> list[Figure]:
    run = write_run(recipe(folder, sized(WEIGHTY, SMALL)), folder / "run")
    hf, mcore = folder / "hf", folder / "mcore"
    with assemble.join_ranks(run) as ranks:
        source = model_source(run, ranks)
        ddp = ddp_config(use_distributed_optimizer=True, overlap_grad_reduce=False, overlap_param_gather=False)
        config = transformer_config(run.recipe, run.shape, virtual_size=None)
        model = build(run.shape, config, ranks, ddp)
        source.load(model, ranks)
        table = source.family.tensors(run.shape)
        export = HfExport(source.family, table, source.config_folder, "5GB")

        def save() -> None:
            hf.mkdir()
            export.save(model, ranks, hf)

        found = _compared("hf export", save, hf, lambda: _weights(hf))
    to_hf_output = folder / "back"
    found += _compared("convert to mcore", lambda: to_mcore(hf, mcore), mcore, lambda: _weights(hf))
    found += _compared("convert to hf", lambda: to_hf(mcore, hf, to_hf_output), to_hf_output, lambda: _weights(hf))
    _require_equal(hf, to_hf_output)
    return found


def _require_equal(first: Path, second: Path) -> None:
    one, other = HfFolder(first), HfFolder(second)
    if sorted(one.names) != sorted(other.names) or any(one.read(name) != other.read(name) for name in one.names):
        raise SystemExit("converting to mcore and back changed the weights: these figures mean nothing")


def _compared(name: str, work: Callable[[], object], output: Path, copied: Callable[[], Path]) -> list[Figure]:
    """`work` makes `output`; each time one file of the same weights is copied and synced right after it."""
    ours, plain, peaks = [], [], []
    for _ in range(TIMES):
        shutil.rmtree(output, ignore_errors=True)
        with peak_memory() as peak:
            ours.append(seconds(work))
        peaks.append(peak.mib)
        plain.append(copy_plain(copied(), output.with_name("copy")))
    ratio = median([o / p for o, p in zip(ours, plain, strict=True)])
    size = bytes_below(output) / MIB
    note = f"{median(ours):.2f} s / {median(plain):.2f} s; {size:.0f} MiB"
    return [
        Figure(name=f"{name} / file copy", value=ratio, unit="x", note=note),
        Figure(name=f"{name}, peak memory", value=max(peaks), unit="MiB"),
    ]


def _weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(figures(Path(sys.argv[1])), sys.argv[2])
