"""Conversion as functions: what `megabatch-convert` does, for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megabatch.converters.dtypes import read_dtype
from megabatch.converters.engine.execute import share
from megabatch.converters.engine.journal import ALONE, Place
from megabatch.converters.engine.plan import Plan
from megabatch.converters.engine.run import Outcome, Say, check_output, run
from megabatch.converters.engine.verify import check_manifest, compare
from megabatch.converters.folder_kinds import check_kinds
from megabatch.converters.hf_model import find_folder
from megabatch.converters.hf_output import HfForm
from megabatch.converters.modes import mode_of
from megabatch.converters.request import ADAPTER, ConversionRequest, Mode, Path_
from megabatch.converters.reshard import plan_reshard
from megabatch.converters.rewrite import plan_rewrite
from megabatch.converters.to_hf import plan_to_hf
from megabatch.converters.to_mcore import plan_to_mcore
from megabatch.errors import ConversionError


def convert(
    request: ConversionRequest,
    *,
    output_dir: Path_,
    exist_ok: bool = False,
    workers: int = 2,
    resume: bool = False,
    verify: bool = False,
    rank: int = 0,
    world: int = 1,
    say: Say = lambda what, size: None,
) -> Outcome:
    """Converts a checkpoint, as `megabatch-convert` does.

    Args: rank, world: this process among those that share the work. `say(what, bytes)` is called for each tensor that
    is `written` or `verified`, from any thread.
    Raises: ConversionError. The work done until then stays next to the output, for `resume`.
    """
    return run(
        make_plan(request),
        output_dir,
        workers=workers,
        place=Place(rank, world),
        exist_ok=exist_ok,
        resume=resume,
        verify=verify,
        say=say,
    )


def make_plan(request: ConversionRequest) -> Plan:
    """The plan of a conversion; nothing is written.

    Raises: ConversionError for anything that does not fit, and for arguments that would have no effect.
    """
    mode = mode_of(request)
    model = find_folder(request.model) if request.model else None
    _check_folders(request, mode, model)
    if mode in ADAPTER:
        return _plan_of_adapter(request, mode, model)
    if mode in (Mode.TO_HF, Mode.MERGED_TO_HF):
        return _plan_to_hf(request, model)
    return _plan_of_hf(request, mode, model)


def _check_folders(request: ConversionRequest, mode: Mode, model: Path | None) -> None:
    reads_config_alone = mode in (Mode.TO_HF, Mode.MERGED_TO_HF, *ADAPTER)
    check_kinds(
        model=None if reads_config_alone else model,
        mcore_model=Path(request.mcore_model) if request.mcore_model else None,
        adapters=[Path(adapter) for adapter in request.adapters],
    )


def _plan_of_adapter(request: ConversionRequest, mode: Mode, model: Path | None) -> Plan:
    from megabatch.converters.adapters.to_mcore import plan_adapter_to_mcore
    from megabatch.converters.adapters.to_peft import plan_adapter_to_peft

    [adapter] = request.adapters
    if mode is Mode.ADAPTER_TO_MCORE:
        return plan_adapter_to_mcore(adapter, model, accept_bin=request.accept_bin, layer_keys=request.layer_keys)
    return plan_adapter_to_peft(adapter, model, peft_format=request.peft_format, accept_bin=request.accept_bin)


def _plan_to_hf(request: ConversionRequest, model: Path | None) -> Plan:
    assert request.mcore_model, "the mode has it"
    return plan_to_hf(
        request.mcore_model, model, _form(request), adapters=request.adapters, accept_bin=request.accept_bin
    )


def _plan_of_hf(request: ConversionRequest, mode: Mode, model: Path | None) -> Plan:
    """Plans from the weights in a Hugging Face folder; without `model`, the folder that the adapters name."""
    if model is None:
        from megabatch.converters.adapters.open import base_weights_of

        model = base_weights_of(request.adapters)
    if mode is Mode.RESHARD:
        return plan_reshard(model, max_shard_size=request.max_shard_size)
    if mode is Mode.REWRITE:
        return plan_rewrite(model, _form(request), adapters=request.adapters, accept_bin=request.accept_bin)
    return plan_to_mcore(
        model,
        torch_dtype=request.torch_dtype,
        accept_bin=request.accept_bin,
        adapters=request.adapters,
        layer_keys=request.layer_keys,
    )


def _form(request: ConversionRequest) -> HfForm:
    dtype = read_dtype(request.torch_dtype)
    return HfForm(dtype, request.max_shard_size, request.expert_layout, request.fp8_quantise)


def is_there(output: Path_) -> bool:
    """Whether the output exists."""
    try:
        check_output(Path(output), exist_ok=False)
    except ConversionError:
        return True
    return False


def compare_output(plan: Plan, output: Path_, *, workers: int = 2, rank: int = 0, world: int = 1) -> None:
    """Compares an existing output with its source, byte by byte. Raises: ConversionError naming the differences."""
    compare(plan, share(plan, rank=rank, world=world), Path(output), workers=workers)
    for small in plan.small if rank == 0 else []:
        path = Path(output) / small.name
        if not path.is_file() or path.read_bytes() != small.make():
            raise ConversionError(f"{path}: is missing or differs from the plan")


def verify_output(output: Path_, *, workers: int = 2) -> int:
    """Compares an output with the digests of its manifest; returns the bytes of it.

    Raises: ConversionError naming what is damaged.
    """
    return check_manifest(Path(output), workers=workers)


def place(environment: Mapping[str, str]) -> Place:
    """This task's place in its Slurm step; a single process outside of one.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but is alone: only srun counts its step's tasks.
    Raises: ConversionError when the step's variables are invalid.
    """
    counted = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if counted == "1":
        return ALONE
    rank = environment.get("SLURM_PROCID", "")
    if not (counted.isdecimal() and rank.isdecimal() and int(rank) < int(counted)):
        raise ConversionError(
            f"SLURM_PROCID={rank} and SLURM_STEP_NUM_TASKS={counted} do not describe a rank; give --rank and --world"
        )
    start = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    known = f"{'.'.join(start)}.{environment.get('SLURM_RESTART_COUNT', '0')}" if all(start) else ""
    return Place(int(rank), int(counted), known)
