"""The conversion step of a chain: what it runs, and its faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megabatch.chain.declare import Convert
from megabatch.converters.command.flags import Flags, command_line
from megabatch.converters.request import ConversionRequest
from megabatch.entry.paths import absolute, absolute_model
from megabatch.errors import ConversionError, Fault


def conversion_arguments(work: Convert, output: Path) -> tuple[str, ...]:
    """The arguments of `python`."""
    return ("-P", "-m", "megabatch.converters.command", *command_line(_flags(work, output)))


def flag_faults(work: Convert) -> Iterator[Fault]:
    """Arguments that `megabatch-convert` would refuse."""
    from megabatch.converters.command.main import check_flags

    try:
        check_flags(_flags(work, Path("output")))
    except ConversionError as error:
        yield Fault("", None, str(error), bare=True)


def source_faults(work: Convert) -> Iterator[Fault]:
    """Faults of an existing source: makes the whole plan and writes nothing."""
    from megabatch.converters import conversion

    try:
        conversion.make_plan(work.request)
    except ConversionError as error:
        yield Fault("", None, str(error), bare=True)


def with_absolute_paths(request: ConversionRequest) -> ConversionRequest:
    """Makes paths absolute, since the job starts in another folder; names of downloaded models stay."""
    return replace(
        request,
        model=absolute_model(request.model),
        mcore_model=absolute(request.mcore_model),
        adapters=tuple(absolute(adapter) for adapter in request.adapters),
    )


def _flags(work: Convert, output: Path) -> Flags:
    """A requeued conversion resumes where it stopped."""
    return Flags(
        request=work.request, output_dir=str(output), resume=True, workers=work.workers or 0, verify=work.verify
    )
