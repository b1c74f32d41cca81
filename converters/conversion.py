"""Conversion as functions: what `megabatch-convert` does, for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megabatch.converters.dtypes import read_dtype
from megabatch.converters.engine.execute import share
from megabatch.converters.engine.journal import ALONE, Place
from megabatch.converters.engine.plan import Plan
from megabatch.converters.engine.run import Outcome, Say, check_output, run
from megabatch.converters.engine.verify import check_manifest, compare
from megabatch.converters.hf_model import find_folder
from megabatch.converters.hf_output import HfForm
from megabatch.converters.kinds import check_kinds
from megabatch.converters.mapping import ExpertLayout
from megabatch.converters.reshard import plan_reshard
from megabatch.converters.rewrite import plan_rewrite
from megabatch.converters.to_hf import plan_to_hf
from megabatch.converters.to_mcore import plan_to_mcore
from megabatch.converters.torch_dist.keys import LayerKeys
from megabatch.converters.ways import Way, way_of
from megabatch.errors import ConversionError

Path_ = str | os.PathLike[str]


def convert(
    *,
    output_dir: Path_,
    to_mcore: bool = False,
    to_hf: bool = False,
    model: Path_ | None = None,
    mcore_model: Path_ | None = None,
    torch_dtype: str | None = None,
    max_shard_size: str | int | None = None,
    expert_layout: ExpertLayout | None = None,
    fp8_quantise: bool = False,
    accept_bin: bool = False,
    adapters: Sequence[Path_] = (),
    merge_lora: bool = False,
    peft_format: str | None = None,
    layer_keys: LayerKeys | None = None,
    exist_ok: bool = False,
    workers: int = 2,
    resume: bool = False,
    verify: bool = False,
    rank: int = 0,
    world: int = 1,
    say: Say = lambda what, size: None,
) -> Outcome:
    """Converts a checkpoint; the arguments are the flags of `megabatch-convert`.

    Args: rank, world: this process among those that share the work. `say(what, bytes)` is told of each tensor that is
    `written` or `verified`, from any thread.
    Raises: ConversionError. What was done until then stays beside the output, for `resume`.
    """
    if to_mcore == to_hf:
        raise ConversionError("give one of to_mcore and to_hf")
    plan = make_plan(
        to_mcore=to_mcore,
        model=model,
        mcore_model=mcore_model,
        torch_dtype=torch_dtype,
        max_shard_size=max_shard_size,
        expert_layout=expert_layout,
        fp8_quantise=fp8_quantise,
        accept_bin=accept_bin,
        adapters=adapters,
        merge_lora=merge_lora,
        peft_format=peft_format,
        layer_keys=layer_keys,
    )
    return run(
        plan,
        output_dir,
        workers=workers,
        place=Place(rank, world),
        exist_ok=exist_ok,
        resume=resume,
        verify=verify,
        say=say,
    )


def make_plan(
    *,
    to_mcore: bool,
    model: Path_ | None = None,
    mcore_model: Path_ | None = None,
    torch_dtype: str | None = None,
    max_shard_size: str | int | None = None,
    expert_layout: ExpertLayout | None = None,
    fp8_quantise: bool = False,
    accept_bin: bool = False,
    adapters: Sequence[Path_] = (),
    merge_lora: bool = False,
    peft_format: str | None = None,
    layer_keys: LayerKeys | None = None,
) -> Plan:
    """The plan of a conversion, towards Hugging Face's format unless `to_mcore`; nothing is written.

    `adapters` are merged into the model's weights with `merge_lora`, else one is converted alone.
    Raises: ConversionError for whatever does not fit, and for arguments that would have no effect.
    """
    way = way_of(
        {
            "to_mcore": to_mcore,
            "to_hf": not to_mcore,
            "model": model,
            "mcore_model": mcore_model,
            "torch_dtype": torch_dtype,
            "max_shard_size": max_shard_size,
            "expert_layout": expert_layout,
            "fp8_quantise": fp8_quantise,
            "accept_bin": accept_bin,
            "adapters": adapters,
            "merge_lora": merge_lora,
            "peft_format": peft_format,
            "layer_keys": layer_keys,
        }
    )
    folder = None if model is None else find_folder(model)
    of_config = way in (Way.TO_HF, Way.MERGED_TO_HF, Way.ADAPTER_TO_MCORE, Way.ADAPTER_TO_PEFT)
    check_kinds(
        model=None if of_config else folder,
        mcore_model=None if mcore_model is None else Path(mcore_model),
        adapters=[Path(adapter) for adapter in adapters],
    )
    if way in (Way.ADAPTER_TO_MCORE, Way.ADAPTER_TO_PEFT):
        from megabatch.converters.adapters.to_mcore import plan_adapter_to_mcore
        from megabatch.converters.adapters.to_peft import plan_adapter_to_peft

        if way is Way.ADAPTER_TO_MCORE:
            return plan_adapter_to_mcore(adapters[0], folder, accept_bin=accept_bin, layer_keys=layer_keys)
        return plan_adapter_to_peft(adapters[0], folder, peft_format=peft_format, accept_bin=accept_bin)
    form = HfForm(read_dtype(torch_dtype), max_shard_size, expert_layout, fp8_quantise)
    if way in (Way.TO_HF, Way.MERGED_TO_HF):
        assert mcore_model is not None
        return plan_to_hf(mcore_model, folder, form, adapters=adapters, accept_bin=accept_bin)
    if folder is None:
        from megabatch.converters.adapters.open import base_weights_of

        folder = base_weights_of(adapters)
    if way is Way.TO_MCORE:
        return plan_to_mcore(
            folder, torch_dtype=torch_dtype, accept_bin=accept_bin, adapters=adapters, layer_keys=layer_keys
        )
    if way is Way.RESHARD:
        return plan_reshard(folder, max_shard_size=form.max_shard_size)
    return plan_rewrite(folder, form, adapters=adapters, accept_bin=accept_bin)


def is_there(output: Path_) -> bool:
    """Whether there is something at the output's name."""
    try:
        check_output(Path(output), exist_ok=False)
    except ConversionError:
        return True
    return False


def compare_output(plan: Plan, output: Path_, *, workers: int = 2, rank: int = 0, world: int = 1) -> None:
    """Compares an output that exists with its source, byte by byte. Raises: ConversionError naming what differs."""
    compare(plan, share(plan, rank=rank, world=world), Path(output), workers=workers)
    for small in plan.small if rank == 0 else []:
        path = Path(output) / small.name
        if not path.is_file() or path.read_bytes() != small.make():
            raise ConversionError(f"{path}: is missing or not what the plan makes")


def verify_output(output: Path_, *, workers: int = 2) -> int:
    """Compares an output with the digests of its manifest; returns the bytes of it.

    Raises: ConversionError naming what is damaged.
    """
    return check_manifest(Path(output), workers=workers)


def place(environment: Mapping[str, str]) -> Place:
    """This task's among those of its Slurm step; alone outside of one.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but is alone: only srun counts its step's tasks.
    Raises: ConversionError when the step's variables are no place.
    """
    counted = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if counted == "1":
        return ALONE
    rank = environment.get("SLURM_PROCID", "")
    if not (counted.isdecimal() and rank.isdecimal() and int(rank) < int(counted)):
        raise ConversionError(
            f"SLURM_PROCID={rank} and SLURM_STEP_NUM_TASKS={counted} are no place in a step; give --rank and --world"
        )
    start = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    known = f"{'.'.join(start)}.{environment.get('SLURM_RESTART_COUNT', '0')}" if all(start) else ""
    return Place(int(rank), int(counted), known)
