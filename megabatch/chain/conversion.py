"""What a conversion step runs, and its faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from megabatch.chain.declare import Convert
from megabatch.errors import ConversionError, Fault


def conversion_arguments(work: Convert, output: Path) -> tuple[str, ...]:
    """What `python` runs; a conversion that comes back goes on where it was."""
    words = ["-P", "-m", "megabatch.converters.command", "--output_dir", str(output), "--resume"]
    for field in fields(work):
        value = getattr(work, field.name)
        if field.name == "resources" or value in (None, False):
            continue
        words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return tuple(words)


def flag_faults(work: Convert) -> Iterator[Fault]:
    """Arguments that `megabatch-convert` would refuse."""
    from megabatch.converters.command.flags import parse
    from megabatch.converters.command.main import check_flags

    try:
        check_flags(parse(conversion_arguments(work, Path("output"))[3:]))
    except ConversionError as error:
        yield Fault("", None, str(error), bare=True)


def source_faults(work: Convert) -> Iterator[Fault]:
    """What is wrong with a source that is there already: the whole plan is made, and nothing is written."""
    from megabatch.converters import conversion

    try:
        conversion.make_plan(
            to_mcore=work.to_mcore,
            model=work.model,
            mcore_model=work.mcore_model,
            torch_dtype=work.torch_dtype,
            max_shard_size=work.max_shard_size,
        )
    except ConversionError as error:
        yield Fault("", None, str(error), bare=True)
