"""What `megabatch-convert` does with its flags, and what it prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from megabatch.converters.command.flags import Flags, changed, help_text, parse
from megabatch.converters.command.progress import Progress
from megabatch.converters.command.sizes import in_words
from megabatch.converters.ways import ARGUMENTS, way_of
from megabatch.errors import ConversionError, MegabatchError

if TYPE_CHECKING:
    from megabatch.converters.engine.journal import Place
    from megabatch.converters.engine.plan import Plan
    from megabatch.converters.mapping import ExpertLayout
    from megabatch.converters.torch_dist.keys import LayerKeys


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line: 0 done, 1 failed, 2 a fault of what was asked for."""
    try:
        code = _main(arguments)
        sys.stdout.flush()  # what is left of the output, which may have lost its reader
        return code
    except OSError as error:  # a reader that is gone, or a full disk behind the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    except MegabatchError as error:
        return _failed(error, code=2)
    try:
        return _run(flags)
    except MegabatchError as error:
        return _failed(error, code=1)
    except KeyboardInterrupt:
        print("interrupted; run again with --resume to go on", file=sys.stderr)
        return 130


def _failed(error: MegabatchError, *, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def check_flags(flags: Flags) -> None:
    """Raises: ConversionError for flags that do not go together, or are not built yet."""
    if not flags.output_dir:
        raise ConversionError("--output_dir is missing; name the folder to make (or, with --verify, to check)")
    if not (flags.to_mcore or flags.to_hf):
        _check_verify(flags)
    else:
        way_of({name: getattr(flags, name) for name in ARGUMENTS}, prefix="--")
    if flags.adapters and not flags.merge_lora and flags.test_convert_precision:
        raise ConversionError("--test_convert_precision compares models; merge the adapter with --merge_lora")
    if flags.test_convert_precision and flags.fp8_quantise:
        raise ConversionError("--test_convert_precision: weights in FP8 differ by more than it allows; leave one out")
    if flags.test_convert_precision and flags.accept_bin:
        raise ConversionError("--test_convert_precision reads safetensors: convert them first, --to_hf --accept_bin")
    if flags.test_convert_precision and flags.to_hf and not flags.mcore_model:
        raise ConversionError("--test_convert_precision compares both formats, and megatron-core's is not there")
    if not flags.test_convert_precision and "test_convert_dtype" in changed(flags):
        raise ConversionError("--test_convert_dtype is about --test_convert_precision, which is not given")
    if flags.test_convert_dtype not in ("float32", "bfloat16"):
        raise ConversionError(f"--test_convert_dtype={flags.test_convert_dtype} must be float32 or bfloat16")
    if (flags.rank < 0) != (flags.world == 0) or flags.rank >= max(flags.world, 1):
        raise ConversionError("--rank and --world belong together, and rank counts from 0 to world - 1")


def _check_verify(flags: Flags) -> None:
    """Of an output that is checked alone nothing else can be said."""
    if not flags.verify:
        raise ConversionError("give --to_mcore or --to_hf, or --verify to check an output by its own digests")
    known = ("output_dir", "verify", "workers", "help")
    if odd := [f"--{name}" for name in changed(flags) if name not in known]:
        raise ConversionError(
            f"{', '.join(odd)}: --verify alone checks an output by its own digests; to compare it "
            "with its source add --to_mcore or --to_hf"
        )


def _run(flags: Flags) -> int:
    from megabatch.converters import conversion
    from megabatch.converters.engine.journal import Place

    if not (flags.to_mcore or flags.to_hf):
        checked = conversion.verify_output(flags.output_dir, workers=_workers(flags))
        print(f"{flags.output_dir}: {in_words(checked)} are as its manifest says")
        return 0
    if flags.test_convert_precision:
        from megabatch.converters.command.precision import check_comparable

        check_comparable(flags)
    plan = conversion.make_plan(
        to_mcore=flags.to_mcore,
        model=flags.model or None,
        mcore_model=flags.mcore_model or None,
        torch_dtype=flags.torch_dtype or None,
        max_shard_size=flags.max_shard_size or None,
        expert_layout=cast("ExpertLayout | None", flags.expert_layout or None),
        fp8_quantise=flags.fp8_quantise,
        accept_bin=flags.accept_bin,
        adapters=flags.adapters,
        merge_lora=flags.merge_lora,
        peft_format=flags.peft_format or None,
        layer_keys=cast("LayerKeys | None", flags.layer_keys or None),
    )
    if flags.dry_run:
        from megabatch.converters.command.report import show_plan

        show_plan(plan, flags.output_dir)
        return 0
    place = Place(flags.rank, flags.world) if flags.world else conversion.place(os.environ)
    checks = (flags.verify or flags.test_convert_precision) and not (flags.exist_ok or flags.resume)
    whole = place.rank == 0
    if checks and conversion.is_there(flags.output_dir):
        if flags.verify:
            conversion.compare_output(
                plan, flags.output_dir, workers=_workers(flags), rank=place.rank, world=place.world
            )
            print(f"{flags.output_dir}: equal to its source in every byte of its tensors")
    else:
        whole = _convert(plan, flags, place)
    # of several ranks the one that gave the output its name compares, or, where it had one, the first
    if flags.test_convert_precision and whole:
        from megabatch.converters.command.precision import compare_models

        compare_models(flags)
    return 0


def _convert(plan: Plan, flags: Flags, place: Place) -> bool:
    """Whether the output has its name now."""
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
    state = "complete" if outcome.committed else f"rank {place.rank} of {place.world} is done, others may not be"
    speed = in_words(round(outcome.written / taken)) if taken else "-"
    print(f"{flags.output_dir}: wrote {in_words(outcome.written)} in {taken:.2f} s, {speed}/s{resumed}; {state}")
    return outcome.committed


_QUIET = ("optimizer and generators are not converted",)


def _workers(flags: Flags) -> int:
    return flags.workers or min(8, os.cpu_count() or 1)
