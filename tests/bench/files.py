"""`megabatch-convert` on 1.2 GB against `cp -r` of the same bytes, both from a cold file cache, as whole processes.

`cp` leaves its data in memory; a conversion is on disk when it ends. The second ratio is against `cp -r` and a sync of
what it wrote.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import MIB, ROOT, Figure, environment, files_below, median, seconds, sized

TIMES = sized(3, 1)
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": True, "rope_theta": 1000000.0,
} | sized({}, {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024})  # fmt: skip
"""Qwen3-0.6B."""
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def make(folder: Path, *, quantised: bool, model: dict[str, Any] = MODEL) -> None:
    """A folder of a model with random numbers, in block-scaled FP8 where it is `quantised`."""
    from megabatch.converters.bijection import TensorInfo
    from megabatch.converters.families import family_of
    from megabatch.converters.safetensors_io import Writer

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model | ({"quantization_config": FP8} if quantised else {})))
    family = family_of(model)
    entries: dict[str, TensorInfo] = {}
    for name, dims in family.hf_tensors(family.shape(model)).items():
        entries[name] = TensorInfo("BF16", dims)
        if quantised and len(dims) == 2:
            entries[name] = TensorInfo("F8_E4M3", dims)
            entries[f"{name}_scale_inv"] = TensorInfo("F32", tuple(-(-size // 128) for size in dims))
    made = random.Random(0)
    block = made.randbytes(4 * MIB).replace(b"\x7f", b"\x01").replace(b"\xff", b"\x02")
    scales = struct.pack("<4099f", *(made.uniform(1e-4, 4e-4) for _ in range(4099)))  # as amax / 448 gives them
    with Writer(folder / "model.safetensors", entries) as writer:
        for name, info in entries.items():
            size = writer._extents[name].size
            content = scales if info.dtype == "F32" else block
            data = content * (size // len(content) + 1)
            writer.write(name, memoryview(data)[:size])


@dataclass(frozen=True, slots=True)
class Way:
    """One conversion, and what is copied beside it."""

    name: str
    source: Path
    flags: Sequence[str]
    target: float
    copied: Path


def files() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        hf, fp8, mcore = folder / "hf", folder / "fp8", folder / "mcore"
        make(hf, quantised=False)
        make(fp8, quantised=True)
        _convert(["--to_mcore", "--model", str(hf)], mcore)
        ways = (
            Way("hf to mcore", hf, ["--to_mcore", "--model", str(hf)], 1.5, hf),
            Way("mcore to hf", mcore, ["--to_hf", "--mcore_model", str(mcore)], 1.5, mcore),
            Way("FP8 to mcore", fp8, ["--to_mcore", "--model", str(fp8)], 4, fp8),
            Way("FP8 to mcore, of what it writes", fp8, ["--to_mcore", "--model", str(fp8)], 4, mcore),
            Way("hf to FP8", hf, ["--to_hf", "--model", str(hf), "--fp8_quantise"], 4, hf),
            Way("BF16 to F32", hf, ["--to_mcore", "--model", str(hf), "--torch_dtype", "float32"], 4, hf),
        )
        return [figure for way in ways for figure in compared(way, folder / "out", folder / "copy")]


def compared(way: Way, out: Path, copy: Path) -> list[Figure]:
    ours, plain, synced, peaks = [], [], [], []
    for _ in range(TIMES):
        cost, peak = _cold(way.source, out, lambda: _convert(way.flags, out))
        ours.append(cost)
        peaks.append(peak)
        copied, both = _cold(way.copied, copy, lambda: _copy(way.copied, copy))
        plain.append(copied)
        synced.append(both)
    size = sum(path.stat().st_size for path in files_below(way.source)) / MIB
    note = f"{median(ours):.2f} s / {median(plain):.2f} s ({median(synced):.2f} s on disk); {size:.0f} MiB"
    pairs = zip(ours, plain, strict=True), zip(ours, synced, strict=True)
    cold, disk = (median([one / other for one, other in pair]) for pair in pairs)
    return [
        Figure(name=f"{way.name} / cp -r", value=cold, unit="x", target=way.target, note=note),
        Figure(name=f"{way.name} / cp -r on disk", value=disk, unit="x"),
        Figure(name=f"{way.name}, peak memory", value=median(peaks), unit="MiB", target=64 + 2 * 4),
    ]


def _cold(source: Path, made: Path, work: Callable[[], float]) -> tuple[float, float]:
    """Seconds of `work`, which reads `source` from disk and makes a folder, and what it returns."""
    shutil.rmtree(made, ignore_errors=True)
    os.sync()
    for path in files_below(source):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    results: list[float] = []
    taken = seconds(lambda: results.append(work()))
    # a copy returns the seconds until it ended; what comes behind is its sync
    return (results[0], taken) if made.name == "copy" else (taken, results[0])


def _convert(flags: Sequence[str], out: Path) -> float:
    """Peak memory in MiB."""
    code = (
        "import sys; from megabatch.converters.command import main; code = main(sys.argv[1:]); "
        "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')), file=sys.stderr); "
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *flags, "--output_dir", str(out), "--workers", "2"]
    done = subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=True)
    return float(done.stderr.splitlines()[-1]) / 1024


def _copy(source: Path, copy: Path) -> float:
    """Seconds of the copy alone; it is on disk when this returns."""
    taken = seconds(lambda: subprocess.run(["cp", "-r", str(source), str(copy)], check=True))
    for path in files_below(copy):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return taken
