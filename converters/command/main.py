"""What `megabatch-convert` does with its flags, and what it prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megabatch.command_line import current_folder, discard_output, open_streams
from megabatch.converters.command.flags import Flags, changed, help_text, parse
from megabatch.converters.command.progress import Progress
from megabatch.converters.command.sizes import in_words
from megabatch.converters.modes import mode_of
from megabatch.errors import ConversionError, MegabatchError

if TYPE_CHECKING:
    from megabatch.converters.engine.journal import Place
    from megabatch.converters.engine.plan import Plan
    from megabatch.converters.request import ConversionRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line: 0 done, 1 failed, 2 a fault in the request."""
    open_streams()
    try:
        code = _main(arguments)
        sys.stdout.flush()  # flush the rest of the output, whose reader may be gone
        return code
    except OSError as error:  # the reader is gone, or the disk behind the output is full
        discard_output()
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    try:
        flags = parse(sys.argv[1:] if arguments is None else arguments)
        if flags.help or arguments == [] or (arguments is None and len(sys.argv) == 1):
            print(help_text())
            return 0
        check_flags(flags)
        current_folder()
    except MegabatchError as error:
        return _failed(error, code=2)
    try:
        return _run(flags)
    except MegabatchError as error:
        return _failed(error, code=1)
    except KeyboardInterrupt:
        print("interrupted; run again with --resume to continue", file=sys.stderr)
        return 130


def _failed(error: MegabatchError, *, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def check_flags(flags: Flags) -> None:
    """Raises: ConversionError for flags that do not go together."""
    if not flags.output_dir:
        raise ConversionError("--output_dir is missing; name the folder to create (or, with --verify, to check)")
    if flags.request.to_mcore or flags.request.to_hf:
        mode_of(flags.request, prefix="--")
    else:
        _check_verify_alone(flags)
    if flags.test_convert_precision:
        _check_precision(flags.request)
    elif "test_convert_dtype" in changed(flags):
        raise ConversionError("--test_convert_dtype has no effect without --test_convert_precision")
    if flags.test_convert_dtype not in ("float32", "bfloat16"):
        raise ConversionError(f"--test_convert_dtype={flags.test_convert_dtype} must be float32 or bfloat16")
    if (flags.rank < 0) != (flags.world == 0) or flags.rank >= max(flags.world, 1):
        raise ConversionError("--rank and --world must be given together, and rank must be from 0 to world - 1")


def _check_verify_alone(flags: Flags) -> None:
    """`--verify` alone takes no other conversion flags."""
    if not flags.verify:
        raise ConversionError("give --to_mcore or --to_hf, or --verify to check an output by its own digests")
    known = ("output_dir", "verify", "workers", "help")
    if odd := [f"--{name}" for name in changed(flags) if name not in known]:
        raise ConversionError(
            f"{', '.join(odd)}: --verify alone checks an output by its own digests; to compare it "
            "with its source add --to_mcore or --to_hf"
        )


def _check_precision(request: ConversionRequest) -> None:
    if request.adapters and not request.merge_lora:
        raise ConversionError("--test_convert_precision compares models; merge the adapter with --merge_lora")
    if request.fp8_quantise:
        raise ConversionError(
            "--test_convert_precision: weights in FP8 differ by more than it allows; leave one of them out"
        )
    if request.accept_bin:
        raise ConversionError("--test_convert_precision reads safetensors: convert them first, --to_hf --accept_bin")
    if request.to_hf and not request.mcore_model:
        raise ConversionError("--test_convert_precision compares both formats, but megatron-core's is not involved")


def _run(flags: Flags) -> int:
    from megabatch.converters import conversion

    if not (flags.request.to_mcore or flags.request.to_hf):
        checked = conversion.verify_output(flags.output_dir, workers=_workers(flags))
        print(f"{flags.output_dir}: {in_words(checked)} are as its manifest says")
        return 0
    if flags.test_convert_precision:
        from megabatch.converters.command.precision import check_comparable

        check_comparable(flags.request)
    plan = conversion.make_plan(flags.request)
    if flags.dry_run:
        from megabatch.converters.command.report import show_plan

        show_plan(plan, flags.output_dir)
        return 0
    judges = _convert_or_compare(plan, flags)
    if flags.test_convert_precision and judges:
        from megabatch.converters.command.precision import compare_models

        compare_models(flags)
    return 0


def _convert_or_compare(plan: Plan, flags: Flags) -> bool:
    """Compares an existing output if the user asked for that and not for replacing or resuming it; else converts.

    Returns: whether this rank then compares the models: the rank that renamed the output, or the first.
    """
    from megabatch.converters import conversion
    from megabatch.converters.engine.journal import Place

    place = Place(flags.rank, flags.world) if flags.world else conversion.place(os.environ)
    checks = (flags.verify or flags.test_convert_precision) and not (flags.exist_ok or flags.resume)
    if not (checks and conversion.is_there(flags.output_dir)):
        return _convert(plan, flags, place)
    if flags.verify:
        conversion.compare_output(plan, flags.output_dir, workers=_workers(flags), rank=place.rank, world=place.world)
        print(f"{flags.output_dir}: equal to its source in every byte of its tensors")
    return place.rank == 0


def _convert(plan: Plan, flags: Flags, place: Place) -> bool:
    """Converts; returns whether the output now has its final name."""
    from megabatch.converters.command.report import left_aside
    from megabatch.converters.engine.execute import share
    from megabatch.converters.engine.run import run

    started = time.monotonic()
    mine = share(plan, rank=place.rank, world=place.world)
    progress = Progress(sum(plan.tensors[number].data_bytes for number in mine), sys.stderr)
    try:
        outcome = run(
            plan,
            flags.output_dir,
            workers=_workers(flags),
            place=place,
            exist_ok=flags.exist_ok,
            resume=flags.resume,
            verify=flags.verify,
            say=progress,
        )
    finally:
        progress.close()
    taken = time.monotonic() - started
    for line in left_aside({name: why for name, why in plan.ignored.items() if why not in _QUIET}):
        if place.rank == 0:
            print(line)
    for note in plan.notes if place.rank == 0 else ():
        print(f"note: {note}")
    resumed = f", {in_words(outcome.resumed)} had been written before" if outcome.resumed else ""
    state = "complete" if outcome.committed else f"rank {place.rank} of {place.world} is done; others may not be"
    speed = in_words(round(outcome.written / taken)) if taken else "-"
    print(f"{flags.output_dir}: wrote {in_words(outcome.written)} in {taken:.2f} s, {speed}/s{resumed}; {state}")
    return outcome.committed


_QUIET = ("optimizer, generators and frozen models are not converted",)


def _workers(flags: Flags) -> int:
    return flags.workers or min(8, os.cpu_count() or 1)
