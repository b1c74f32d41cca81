"""Commands and their arguments; each command's work is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from megabatch.command_line import run_command
from megabatch.errors import ConfigError

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line: 0 done, 1 failed, 2 a fault in the request."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _run(words), words)


def _run(arguments: Sequence[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    if rest and options.command not in ("plan", "prepare", "evaluate", "check", "rehearse", "rollout"):
        raise ConfigError(f"{rest[0]} is not an option of `megabatch {options.command}`; see --help")
    return _COMMANDS[options.command](options, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megabatch", description="Watch, stop and resume runs; check recipes and machines."
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _of_runs(commands)
    _of_generated(commands)
    _of_several(commands)
    _of_recipes(commands)
    _of_servers(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"megabatch {version('megabatch')}")
        parser.exit()


def _of_runs(commands: _Commands) -> None:
    status = commands.add_parser("status", help="show the state of runs")
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories, or folders of them")
    status.add_argument("--json", action="store_true", help="one JSON array, for programs")
    status.add_argument("--watch", action="store_true", help="redraw the table until q is pressed")

    why = commands.add_parser("why", help="show why a run failed: the first rank, the cause, the fix, its log")
    why.add_argument("run", type=Path, metavar="RUN")
    why.add_argument("--attempt", type=int, help="which attempt, 0 first (default: the newest that failed)")
    why.add_argument("--json", action="store_true", help="one JSON object, for programs")

    diff = commands.add_parser("diff", help="show how two runs differ: configuration, environment, code, script")
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    diff.add_argument("--code", action="store_true", help="show every changed line of code too")
    diff.add_argument("--json", action="store_true", help="one JSON object, for programs")

    report = commands.add_parser("report", help="write one HTML page about runs, with curves and timelines")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    report.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")

    logs = commands.add_parser("logs", help="print a rank's log")
    logs.add_argument("run", type=Path, metavar="RUN")
    logs.add_argument("-f", "--follow", action="store_true", help="follow the log until the run ends")
    logs.add_argument("--rank", default="0", help="which rank, or `batch` for the job script (default: 0)")
    logs.add_argument("--attempt", type=int, help="which attempt, 0 first (default: the newest)")

    cancel = commands.add_parser("cancel", help="cancel runs' jobs")
    resume = commands.add_parser("resume", help="submit runs again, to resume from their last checkpoint")
    for command in (cancel, resume):
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    resume.add_argument(
        "--from", dest="back_to", metavar="STEP", help="go back to this checkpoint, such as step_00000100"
    )
    resume.add_argument("--chain", type=_count, metavar="N", help="in N jobs, for clusters that forbid requeue")

    checkpoint = commands.add_parser(
        "checkpoint", help="compare checkpoints with the digests taken when they were saved"
    )
    checkpoint.add_argument("action", choices=("verify",))
    checkpoint.add_argument(
        "folder", type=Path, metavar="RUN|FOLDER", help="a run, one step_* folder, or a conversion"
    )
    checkpoint.add_argument(
        "--workers", type=_count, default=4, metavar="N", help="files to check at a time (default: 4)"
    )


def _of_generated(commands: _Commands) -> None:
    completions = commands.add_parser("completions", help="show what a run generated, and its rewards")
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

    replay = commands.add_parser(
        "replay", help="repeat one update of GRPO on one process, and compare it with the run's"
    )
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("--step", type=_count, required=True, help="which step; the checkpoint before it is needed")
    replay.add_argument(
        "--tolerance", type=float, help="largest relative difference (default: 1e-5 in float32, wider in 16 bits)"
    )
    replay.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _of_several(commands: _Commands) -> None:
    chain = commands.add_parser("chain", help="show the state of a chain's steps, or cancel them all")
    chain.add_argument("action", choices=("show", "cancel"))
    chain.add_argument("folder", type=Path, metavar="FOLDER", help="the chain's folder")

    sweep = commands.add_parser("sweep", help="rank the runs of a sweep")
    sweep.add_argument("action", choices=("show",))
    sweep.add_argument("folder", type=Path, metavar="FOLDER", help="the sweep's folder")
    measure = "metric to rank by, such as eval_loss or eval_reward (default: metric_for_best_model, else tokens_per_s)"
    sweep.add_argument("--by", metavar="METRIC", help=measure)
    sweep.add_argument("--json", action="store_true", help="one JSON array, for programs")


def _of_recipes(commands: _Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="show a recipe's plan with memory and time, with any of its flags; or rank its layouts on N GPUs",
        add_help=False,
        allow_abbrev=False,
    )
    plan.add_argument("recipe", type=Path, metavar="RECIPE.py")
    plan.add_argument("--gpu", metavar="NAME")
    plan.add_argument("--gpus", type=int, metavar="N")
    plan.add_argument("--gpu_memory_gib", type=float, metavar="GIB")
    plan.add_argument("--all", action="store_true")
    plan.add_argument("--json", action="store_true")

    prepare = commands.add_parser(
        "prepare",
        help="tokenise a recipe's data in advance, with any of its flags, so that no GPU waits for it",
        allow_abbrev=False,
    )
    prepare.add_argument("recipe", type=Path, metavar="RECIPE.py")

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a run, an exported folder or a recipe's model on held-out data, with any of a recipe's flags",
        allow_abbrev=False,
    )
    evaluate.add_argument("target", type=Path, metavar="RUN|FOLDER|RECIPE.py")
    evaluate.add_argument("--task", help="what a folder is for, such as sft, seq_cls or reranker")
    evaluate.add_argument(
        "--checkpoint", metavar="STEP", help="of a run: step_00000100, or `best` (default: the newest)"
    )
    evaluate.add_argument("--output", type=Path, help="file to write (default: evaluation.json in the run, else here)")

    check = commands.add_parser(
        "check",
        help="show on this machine that a recipe's layout computes what one process computes, with any of its flags",
        allow_abbrev=False,
    )
    check.add_argument("recipe", type=Path, metavar="RECIPE.py")
    check.add_argument("--steps", type=int, default=4, help="optimizer steps to compare (default: %(default)s)")
    check.add_argument("--dir", type=Path, help="folder to keep both runs in")

    rehearse = commands.add_parser(
        "rehearse",
        help="show on this machine that a recipe's runs resume bit for bit, with any of its flags",
        allow_abbrev=False,
    )
    rehearse.add_argument("recipe", type=Path, metavar="RECIPE.py")
    rehearse.add_argument("--steps", type=int, default=20, help="steps of the rehearsal (default: %(default)s)")
    rehearse.add_argument(
        "--faults_seed",
        type=int,
        default=0,
        help="random seed of the stop, the kill and the rank to kill (default: %(default)s)",
    )
    rehearse.add_argument("--dir", type=Path, help="folder to keep both runs in")

    doctor = commands.add_parser("doctor", help="check this machine or a cluster, and show a fix for each failure")
    doctor.add_argument("--cluster", metavar="NAME", help="compare this cluster profile with the live cluster")
    doctor.add_argument("--run", action="store_true", help="with --cluster: check a node too, with a short job")
    doctor.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _of_servers(commands: _Commands) -> None:
    rollout = commands.add_parser(
        "rollout",
        help="start a vLLM server that GRPO generates with; further flags go to vLLM as they are",
        allow_abbrev=False,
    )
    rollout.add_argument("model", metavar="MODEL", help="the model's folder, or its name on a hub")
    rollout.add_argument("--host", default="0.0.0.0", help="address to serve on (default: %(default)s)")
    rollout.add_argument("--port", type=_count, help="port (default: MEGABATCH_ROLE_PORT, or 8000)")
    rollout.add_argument("--tensor_parallel_size", type=_count, default=1, help="GPUs that share the model's matrices")
    rollout.add_argument("--dtype", help="of weights and computation, the trainer's torch_dtype")
    rollout.add_argument("--max_model_len", type=_count, help="longest prompt plus completion in tokens")


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _status(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.status import show_status

    return show_status(options.runs, as_json=options.json, watch=options.watch)


def _why(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.why import show_why

    return show_why(options.run, attempt=options.attempt, as_json=options.json)


def _diff(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.diff import show_diff

    return show_diff(options.a, options.b, code=options.code, as_json=options.json)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.report import write_report

    return write_report(options.runs, output=options.output)


def _completions(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.completions import Asked, show_completions

    asked = Asked(
        step=options.step,
        order=options.order,
        grep=options.grep,
        number=options.number,
        full=options.full,
        as_json=options.json,
        check=options.check,
    )
    return show_completions(options.run, asked)


def _replay(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.replay import replay

    return replay(options.run, step=options.step, tolerance=options.tolerance, as_json=options.json)


def _logs(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.jobs import show_logs

    return show_logs(options.run, rank=options.rank, attempt=options.attempt, follow=options.follow)


def _cancel(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.jobs import cancel_runs

    return cancel_runs(options.runs)


def _resume(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.jobs import resume_runs

    return resume_runs(options.runs, links=options.chain, back_to=options.back_to)


def _checkpoint(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.checkpoint import verify

    return verify(options.folder, workers=options.workers)


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    from megabatch.cli.plan import PlanOptions, show_plan

    asked = PlanOptions(
        gpu=options.gpu,
        gpus=options.gpus,
        gpu_memory_gib=options.gpu_memory_gib,
        everything=options.all,
        as_json=options.json,
    )
    return show_plan(options.recipe, rest, asked)


def _prepare(options: argparse.Namespace, rest: list[str]) -> int:
    from megabatch.cli.prepare import prepare_recipe

    return prepare_recipe(options.recipe, rest)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    from megabatch.cli.evaluate import EvaluateOptions, evaluate_target

    asked = EvaluateOptions(task=options.task, checkpoint=options.checkpoint, output=options.output)
    return evaluate_target(options.target, rest, asked)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    from megabatch.cli.check import check_recipe

    return check_recipe(options.recipe, rest, steps=options.steps, folder=options.dir)


def _rehearse(options: argparse.Namespace, rest: list[str]) -> int:
    from megabatch.cli.rehearse import rehearse_recipe

    return rehearse_recipe(options.recipe, rest, steps=options.steps, seed=options.faults_seed, folder=options.dir)


def _chain(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.chain import chain

    return chain(options.action, options.folder)


def _sweep(options: argparse.Namespace, _: list[str]) -> int:
    from megabatch.cli.sweep import show_sweep

    return show_sweep(options.folder, by=options.by, json=options.json)


def _rollout(options: argparse.Namespace, rest: list[str]) -> int:
    from megabatch.cli.rollout import serve
    from megabatch.rollout.vllm.engine_options import EngineOptions

    names = ("model", "tensor_parallel_size", "dtype", "max_model_len")
    engine = EngineOptions(**{name: getattr(options, name) for name in names})
    return serve(engine, rest, host=options.host, port=options.port)


def _doctor(options: argparse.Namespace, _: list[str]) -> int:
    if options.run and not options.cluster:
        raise ConfigError("--run checks a node of a cluster; add --cluster NAME")
    from megabatch.doctor.report import show_report

    return show_report(as_json=options.json, cluster=options.cluster, run=options.run)


_COMMANDS = {
    "status": _status,
    "why": _why,
    "diff": _diff,
    "report": _report,
    "completions": _completions,
    "replay": _replay,
    "logs": _logs,
    "cancel": _cancel,
    "resume": _resume,
    "checkpoint": _checkpoint,
    "plan": _plan,
    "prepare": _prepare,
    "evaluate": _evaluate,
    "check": _check,
    "rehearse": _rehearse,
    "chain": _chain,
    "sweep": _sweep,
    "doctor": _doctor,
    "rollout": _rollout,
}
