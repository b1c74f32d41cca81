"""`--test_convert_precision`: the trainer's program compares the models of both formats.

We start it as a process instead of importing it, because it needs torch and megatron-core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megabatch.converters.command.flags import Flags
from megabatch.converters.conversion import convert
from megabatch.converters.dtypes import TORCH, read_dtype
from megabatch.converters.families import family_of
from megabatch.converters.hf_model import find_folder, read_config
from megabatch.converters.request import ConversionRequest
from megabatch.converters.torch_dist.find import find_torch_dist
from megabatch.errors import ConversionError
from megabatch.trainable import untrainable


def check_comparable(request: ConversionRequest) -> None:
    """Raises: ConversionError when the trainer does not implement the model of --model."""
    if not request.model:
        return
    config = read_config(find_folder(request.model))
    if reason := untrainable(family_of(config).shape(config)):
        raise ConversionError(f"--test_convert_precision compares with the trainer's model: {reason}")


def compare_models(flags: Flags) -> None:
    """Raises: ConversionError when the models do not compute the same."""
    with _both(flags) as (folder, checkpoint):
        program = [sys.executable, "-m", "megabatch.trainer.precision", folder, str(find_torch_dist(checkpoint))]
        program += ["--dtype", flags.test_convert_dtype]
        if (rounded := read_dtype(flags.request.torch_dtype)) is not None:
            program += ["--weights", TORCH[rounded]]
        done = subprocess.run(program, check=False)
    if done.returncode:
        raise ConversionError("the models of both formats do not compute the same, or could not be compared")


@contextmanager
def _both(flags: Flags) -> Iterator[tuple[str, str]]:
    """The Hugging Face folder and the checkpoint; a merged model has only one, and we convert it to get the other."""
    request = flags.request
    if not request.merge_lora:
        source, output = request.model if request.to_mcore else request.mcore_model, flags.output_dir
        assert source, "the mode has it"
        yield (str(find_folder(source)), output) if request.to_mcore else (output, str(source))
        return
    parent = Path(os.path.abspath(flags.output_dir)).parent
    with tempfile.TemporaryDirectory(prefix=".precision-", dir=parent) as name:
        other = os.path.join(name, "other")
        if request.to_mcore:
            convert(ConversionRequest(to_hf=True, mcore_model=flags.output_dir), output_dir=other)
            yield other, flags.output_dir
        else:
            convert(ConversionRequest(to_mcore=True, model=flags.output_dir), output_dir=other)
            yield flags.output_dir, other
