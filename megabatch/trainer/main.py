"""The process of one rank: `python -m megabatch.trainer.main RUN_DIR`, started by a job script or by `--local`.

Only `main` imports torch and megatron-core, not the module: processes that Python spawns import this file too, and a
stop request must already work during the seconds that those imports take.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megabatch.config.run import RunConfig
from megabatch.run_directory import ExitCode, RunDirectory
from megabatch.trainer import failures
from megabatch.trainer.activity import Activity
from megabatch.trainer.megatron_imports import without_trackers
from megabatch.trainer.signals import StopSignal


def main(arguments: list[str]) -> int:
    """Exit status of the rank; see `ExitCode`."""
    stop = StopSignal()
    gc.disable()  # until everything is imported: what imports make stays, and searching it takes a tenth of their time

    def work(run: RunConfig, activity: Activity) -> int:
        from megabatch.trainer.loop import train

        gc.freeze()  # nor need later searches look through 300,000 objects, a quarter of a second each
        gc.enable()
        return train(run, stop, activity)

    return as_rank(arguments, work, module="megabatch.trainer.main")


def as_rank(arguments: list[str], work: Callable[[RunConfig, Activity], int], *, module: str) -> int:
    """Does a rank's work on the run whose folder is the only argument; its exit status."""
    activity = Activity(_rank())
    activity.listen()
    if len(arguments) != 1:
        print(f"usage: python -m {module} RUN_DIR", file=sys.stderr)
        return ExitCode.CONFIG
    try:
        run = RunConfig.load(RunDirectory(Path(arguments[0])).run_json)
        configure_logging(run)
        prepare_device(run)
        return work(run, activity)
    except Exception as e:
        return failures.report(e)


def leave(status: int) -> NoReturn:
    """Ends the process at once: threads of gloo and of data workers must not hold up a rank that is done."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def prepare_device(run: RunConfig) -> None:
    """Sets what must be set before the first use of torch or CUDA in this process."""
    if not run.recipe.resources.gpus_per_node:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run on CPUs is one, whatever the machine has
        from megabatch.trainer.megatron_cpu import adapt

        adapt()
        return
    if run.recipe.training.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to run cuBLAS without it
    # Transformer Engine reads it here, and megatron-core insists that its own setting agrees
    os.environ["NVTE_APPLY_QK_LAYER_SCALING"] = str(int(bool(run.recipe.precision.apply_query_key_layer_scaling)))
    with without_trackers():
        importlib.import_module("megatron.core")


def configure_logging(run: RunConfig) -> None:
    rank = _rank()
    level = (run.recipe.logging.logging_level or ("info" if rank == 0 else "warning")).upper()
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s", force=True)
    logging.getLogger("megabatch").setLevel(level)
    # megatron-core warns of each optional package that is missing, on import and on every rank; `doctor` lists them
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


if __name__ == "__main__":
    leave(int(main(sys.argv[1:])))
