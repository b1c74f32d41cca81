"""The arguments of each command, with their help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_FLAGS_TOO = "The recipe's own flags may follow, such as --lr 1e-5; `python RECIPE.py --help` lists them."


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="megabatch", description="Watch, stop and resume runs; check recipes and machines."
    )
    whole.add_argument("--version", nargs=0, action=_Version, help="print the version")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    _of_runs(commands)
    _of_generated(commands)
    _of_several(commands)
    _of_recipes(commands)
    _of_proofs(commands)
    _of_servers(commands)
    return whole


def _command(commands: _Commands, name: str, told: str, **settings: Any) -> argparse.ArgumentParser:
    """A command with one phrase about it, in the list of commands and in its own help."""
    return commands.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.", **settings)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"megabatch {version('megabatch')}")
        parser.exit()


def _of_runs(commands: _Commands) -> None:
    status = _command(commands, "status", "show the state of runs")
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories, or folders of them")
    status.add_argument("--json", action="store_true", help="one JSON array, for programs")
    status.add_argument("--watch", action="store_true", help="redraw the table until q is pressed")

    why = _command(commands, "why", "show why a run failed: the first rank, the cause, the fix, its log")
    why.add_argument("run", type=Path, metavar="RUN")
    why.add_argument("--attempt", type=int, help="which attempt, 0 first (default: the newest that failed)")
    why.add_argument("--json", action="store_true", help="one JSON object, for programs")

    diff = _command(commands, "diff", "show how two runs differ: configuration, environment, code, script")
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    diff.add_argument("--code", action="store_true", help="show every changed line of code too")
    diff.add_argument("--json", action="store_true", help="one JSON object, for programs")

    report = _command(commands, "report", "write one HTML page about runs, with curves and timelines")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    report.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")

    logs = _command(commands, "logs", "print a rank's log")
    logs.add_argument("run", type=Path, metavar="RUN")
    logs.add_argument("-f", "--follow", action="store_true", help="follow the log until the run ends")
    logs.add_argument("--rank", default="0", help="which rank, or `batch` for the job script (default: 0)")
    logs.add_argument("--attempt", type=int, help="which attempt, 0 first (default: the newest)")

    cancel = _command(commands, "cancel", "cancel runs' jobs")
    resume = _command(commands, "resume", "submit runs again, to resume from their last checkpoint")
    for command in (cancel, resume):
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    resume.add_argument(
        "--from", dest="back_to", metavar="STEP", help="go back to this checkpoint, such as step_00000100"
    )
    resume.add_argument("--chain", type=_count, metavar="N", help="in N jobs, for clusters that forbid requeue")

    checkpoint = _command(commands, "checkpoint", "compare checkpoints with the digests taken when they were saved")
    checkpoint.add_argument("action", choices=("verify",))
    checkpoint.add_argument(
        "folder", type=Path, metavar="RUN|FOLDER", help="a run, one step_* folder, or a conversion"
    )
    checkpoint.add_argument(
        "--workers", type=_count, default=4, metavar="N", help="files to check at a time (default: 4)"
    )


def _of_generated(commands: _Commands) -> None:
    completions = _command(commands, "completions", "show what a run generated, and its rewards")
    completions.add_argument("run", type=Path, metavar="RUN")
    completions.add_argument("--step", type=int, help="which step (default: the newest; with --grep, all)")
    order = completions.add_mutually_exclusive_group()
    order.add_argument("--worst", dest="order", action="store_const", const="worst", help="lowest rewards first")
    order.add_argument("--best", dest="order", action="store_const", const="best", help="highest rewards first")
    completions.add_argument("--grep", metavar="PATTERN", help="only where prompt or completion matches")
    completions.add_argument("-n", "--number", type=_count, default=5, help="how many (default: %(default)s)")
    completions.add_argument("--full", action="store_true", help="do not cut long texts")
    completions.add_argument("--json", action="store_true", help="one JSON object a line, with tokens, for programs")
    completions.add_argument("--check", action="store_true", help="read all of it; exit code 1 if anything is missing")

    replay = _command(commands, "replay", "repeat one update of GRPO on one process, and compare it with the run's")
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("--step", type=_count, required=True, help="which step; the checkpoint before it is needed")
    replay.add_argument(
        "--tolerance", type=float, help="largest relative difference (default: 1e-5 in float32, wider in 16 bits)"
    )
    replay.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _of_several(commands: _Commands) -> None:
    chain = _command(commands, "chain", "show the state of a chain's steps, or cancel them all")
    chain.add_argument("action", choices=("show", "cancel"))
    chain.add_argument("folder", type=Path, metavar="FOLDER", help="the chain's folder")

    sweep = _command(commands, "sweep", "rank the runs of a sweep")
    sweep.add_argument("action", choices=("show",))
    sweep.add_argument("folder", type=Path, metavar="FOLDER", help="the sweep's folder")
    measure = "metric to rank by, such as eval_loss or eval_reward (default: metric_for_best_model, else tokens_per_s)"
    sweep.add_argument("--by", metavar="METRIC", help=measure)
    sweep.add_argument("--json", action="store_true", help="one JSON array, for programs")


def _of_recipes(commands: _Commands) -> None:
    plan = _command(
        commands,
        "plan",
        "show a recipe's plan with memory and time, with any of its flags; or rank its layouts on N GPUs",
        add_help=False,
        allow_abbrev=False,
    )
    plan.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE.py")
    plan.add_argument("--gpu", metavar="NAME")
    plan.add_argument("--gpus", type=int, metavar="N")
    plan.add_argument("--gpu_memory_gib", type=float, metavar="GIB")
    plan.add_argument("--all", action="store_true")
    plan.add_argument("--json", action="store_true")

    prepare = _command(
        commands,
        "prepare",
        "tokenise a recipe's data in advance, with any of its flags, so that no GPU waits for it",
        allow_abbrev=False,
        epilog=_FLAGS_TOO,
    )
    prepare.add_argument("recipe", type=Path, metavar="RECIPE.py")

    evaluate = _command(
        commands,
        "evaluate",
        "measure a run, an exported folder or a recipe's model on held-out data, with any of a recipe's flags",
        allow_abbrev=False,
        epilog=_FLAGS_TOO,
    )
    evaluate.add_argument("target", type=Path, metavar="RUN|FOLDER|RECIPE.py")
    evaluate.add_argument("--task", help="what a folder is for, such as sft, seq_cls or reranker")
    evaluate.add_argument(
        "--checkpoint", metavar="STEP", help="of a run: step_00000100, or `best` (default: the newest)"
    )
    evaluate.add_argument("--output", type=Path, help="file to write (default: evaluation.json in the run, else here)")


def _of_proofs(commands: _Commands) -> None:
    check = _command(
        commands,
        "check",
        "show on this machine that a recipe's layout computes what one process computes, with any of its flags",
        allow_abbrev=False,
        epilog=_FLAGS_TOO,
    )
    check.add_argument("recipe", type=Path, metavar="RECIPE.py")
    check.add_argument("--steps", type=int, default=4, help="optimizer steps to compare (default: %(default)s)")
    check.add_argument("--dir", type=Path, help="folder to keep both runs in")

    rehearse = _command(
        commands,
        "rehearse",
        "show on this machine that a recipe's runs resume bit for bit, with any of its flags",
        allow_abbrev=False,
        epilog=_FLAGS_TOO,
    )
    rehearse.add_argument("recipe", type=Path, metavar="RECIPE.py")
    rehearse.add_argument(
        "--steps", type=int, default=20, help="steps of the rehearsal, at least 12 (default: %(default)s)"
    )
    rehearse.add_argument(
        "--faults_seed",
        type=int,
        default=0,
        help="random seed of the stop, the kill and the rank to kill (default: %(default)s)",
    )
    rehearse.add_argument("--dir", type=Path, help="folder to keep both runs in")

    doctor = _command(commands, "doctor", "check this machine or a cluster, and show a fix for each failure")
    doctor.add_argument("--cluster", metavar="NAME", help="compare this cluster profile with the live cluster")
    doctor.add_argument("--run", action="store_true", help="with --cluster: check a node too, with a short job")
    doctor.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _of_servers(commands: _Commands) -> None:
    rollout = _command(
        commands,
        "rollout",
        "start a vLLM server that GRPO generates with; further flags go to vLLM as they are",
        allow_abbrev=False,
    )
    rollout.add_argument("model", metavar="MODEL", help="the model's folder, or its name on a hub")
    rollout.add_argument("--host", default="0.0.0.0", help="address to serve on (default: %(default)s)")
    rollout.add_argument("--port", type=_count, help="port (default: MEGABATCH_ROLE_PORT, or 8000)")
    rollout.add_argument("--tensor_parallel_size", type=_count, default=1, help="GPUs that share the model's matrices")
    rollout.add_argument("--dtype", help="of weights and computation, the trainer's torch_dtype")
    rollout.add_argument("--max_model_len", type=_count, help="longest prompt plus completion in tokens")
    rollout.add_argument("--lora_rank", type=_count, help="most of an adapter, for runs with vllm_enable_lora")
    rollout.add_argument(
        "--lora_layers",
        type=lambda text: text.split(","),
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        metavar="NAME,...",
        help="with --lora_rank: layers that adapters may have (default: all of attention and MLPs)",
    )


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)
