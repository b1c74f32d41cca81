"""The command line `megabatch`; each command's work is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megabatch.cli.arguments import parser
from megabatch.command_line import run_command
from megabatch.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line: 0 done, 1 failed, 2 a fault in the request."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _run(words), words)


def _run(arguments: Sequence[str]) -> int:
    whole = parser()
    options, rest = whole.parse_known_args(arguments)
    if options.command is None:
        whole.print_help(sys.stderr)
        return 2
    if rest and options.command not in ("plan", "prepare", "evaluate", "check", "rehearse", "rollout"):
        raise ConfigError(f"{rest[0]} is not an option of `megabatch {options.command}`; see --help")
    return _COMMANDS[options.command](options, rest)


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
    from megabatch.cli.plan import PlanOptions, show_plan, show_usage

    asked = PlanOptions(
        gpu=options.gpu,
        gpus=options.gpus,
        gpu_memory_gib=options.gpu_memory_gib,
        everything=options.all,
        as_json=options.json,
    )
    if options.recipe is None:
        return show_usage(rest)
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
    from megabatch.rollout.vllm.engine_options import EngineOptions, room_for

    names = ("model", "tensor_parallel_size", "dtype", "max_model_len", "lora_layers")
    rank = None if options.lora_rank is None else room_for(options.lora_rank)
    engine = EngineOptions(**{name: getattr(options, name) for name in names}, lora_rank=rank)
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
