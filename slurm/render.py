"""The sbatch script of a job: a pure function of what is asked for, the same on a laptop as on a cluster.

How a run stops: Slurm sends USR2 to the batch shell before the time limit, which forwards it to every rank through
srun. All ranks save after the same step and exit with `ExitCode.REQUEUE`; the shell then puts the job back into the
queue. After TERM (scancel, preemption, an operator's requeue) the ranks save too, but whether the job comes back is
Slurm's decision.
"""

from __future__ import annotations

import re
import textwrap

from megabatch.config.walltime import seconds
from megabatch.errors import LaunchError
from megabatch.run_directory import ExitCode
from megabatch.slurm.container import inside, srun_flags
from megabatch.slurm.environment import Variable, job_variables
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import directive, label, shell

_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(_|$)", re.I)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def render(job: JobSpec, profile: ClusterProfile) -> str:
    """The exact text that sbatch gets.

    Raises: LaunchError for a secret among the variables, and for text that Slurm or bash cannot carry.
    """
    variables = job_variables(job, profile)
    inherit = tuple(dict.fromkeys((*profile.inherit, *job.inherit)))
    _check_names(variables, inherit)
    sections = (
        _directives(job, profile),
        ["set -eo pipefail"],
        _STOP_HANDLING,
        _run_directory(job),
        _modules(profile),
        _environment(job, variables, inherit),
        _RENDEZVOUS,
        _rank_script(variables, profile),
        _launch(job, profile, exported=[v.name for v in variables if not v.node_local] + list(inherit)),
        _finish(job),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _check_names(variables: list[Variable], inherit: tuple[str, ...]) -> None:
    for name in (*(v.name for v in variables), *inherit):
        if not _NAME.fullmatch(name):
            raise LaunchError(f"environment variable {name!r} is not a name that a shell can export; rename it")
    for variable in variables:
        if _SECRET.search(variable.name):
            raise LaunchError(
                f"environment.{variable.name} looks like a secret, and job scripts are readable by others; export it "
                f"in the shell that submits and list its name under `inherit`"
            )


def _log_folder(job: JobSpec) -> str:
    """As a pattern of sbatch's, where % begins a symbol and one backslash anywhere turns all symbols off."""
    if "\\" in str(job.run_directory):
        raise LaunchError(f"{job.run_directory}: Slurm cannot write to a folder with a backslash; choose another name")
    return str(job.files.logs).replace("%", "%%")


def _time_limit(job: JobSpec, profile: ClusterProfile) -> str | None:
    """The run's limit, cut to the longest that the cluster gives: a run that is cut saves, requeues and goes on."""
    limits = [limit for limit in (job.time, profile.time) if limit is not None]
    shortest = min(limits, key=seconds, default=None)
    if shortest is not None and job.signal_delay_s >= seconds(shortest):
        raise LaunchError(
            f"resources.signal_delay_s={job.signal_delay_s} must be below the time limit of {seconds(shortest)} s, or "
            f"every run is asked to stop as it starts; try {max(1, seconds(shortest) // 4)}"
        )
    return shortest


def _directives(job: JobSpec, profile: ClusterProfile) -> list[str]:
    options: dict[str, str | int | bool | None] = {
        "job-name": label(job.name),
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "exclude": profile.exclude,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-node": job.gpus_per_node or None,
        "mem": None if job.mem_gib is None else f"{job.mem_gib}G" if job.mem_gib else "0",
        "time": _time_limit(job, profile),
        "signal": f"B:USR2@{job.signal_delay_s}",
        "requeue" if job.requeue else "no-requeue": True,
        "open-mode": "append",
        "chdir": None if job.working_directory is None else str(job.working_directory),
        "output": f"{_log_folder(job)}/batch.%j.log",
        "export": "ALL",
        "kill-on-invalid-dep": "yes",
    }
    options |= {name.replace("_", "-"): value for name, value in profile.sbatch.items()}
    chosen = {name: value for name, value in options.items() if value is not None and value is not False}
    return ["#!/bin/bash", *(directive(name, value) for name, value in chosen.items())]


_STOP_HANDLING = """\
# USR2 is the time limit's warning; TERM is scancel, preemption or an operator's requeue. srun passes USR2 on to the
# ranks and TERM not, so both go on as USR2; a rank that does not listen yet finds the file.
stop= interrupted= srun_pid=
ask_to_stop() {
    if [ "$1" = TERM ] || [ -z "$stop" ]; then stop=$1; fi
    interrupted=1
    if [ -n "$srun_pid" ]; then forward_stop; fi
}
forward_stop() {
    : >"$MEGABATCH_STOP_REQUEST" || true
    kill -USR2 "$srun_pid" 2>/dev/null || true
}
trap 'ask_to_stop USR2' USR2
trap 'ask_to_stop TERM' TERM""".splitlines()


_MARKS = {"MEGABATCH_STOP_REQUEST": "stop", "MEGABATCH_STOPPED": "stopped", "MEGABATCH_FAILED": "failed"}


def _run_directory(job: JobSpec) -> list[str]:
    return [
        f"export MEGABATCH_RUN={shell(str(job.run_directory))}",
        'export MEGABATCH_RESTART="${SLURM_RESTART_COUNT:-0}"',
        "# asked to stop, stopped with everything saved, and who failed first",
        *(
            f'export {name}="$MEGABATCH_RUN/logs/{file}.$SLURM_JOB_ID.$MEGABATCH_RESTART"'
            for name, file in _MARKS.items()
        ),
        'mkdir -p -- "$MEGABATCH_RUN/logs"',
    ]


def _modules(profile: ClusterProfile) -> list[str]:
    lines = list(profile.setup)
    if profile.modules:
        lines += [
            "for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /usr/share/lmod/lmod/init/bash; do",
            '    if ! type module >/dev/null 2>&1 && [ -r "$init" ]; then . "$init"; fi',
            "done",
            f"module load {' '.join(map(shell, profile.modules))}",
        ]
    return lines


def _environment(job: JobSpec, variables: list[Variable], inherit: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    for variable in variables:
        if not variable.node_local:
            lines += [*_comment(variable.reason), f"export {variable.name}={shell(variable.value)}"]
    if job.snapshot is not None:
        path = shell(str(job.snapshot))
        lines += ["# the code as it was at submission", f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    for name in inherit:
        lines.append(f'[ -n "${{{name}+set}}" ] || echo "megabatch: {name} is not set in the submitting shell" >&2')
    if job.cpus_per_task is not None:
        lines += [
            "# sbatch's --cpus-per-task does not reach srun by itself",
            f"export SRUN_CPUS_PER_TASK={job.cpus_per_task}",
        ]
    return [
        *lines,
        f"export WORLD_SIZE={job.world_size} LOCAL_WORLD_SIZE={job.tasks_per_node}",
    ]


_RENDEZVOUS = """\
# Rank 0 runs on the first node; where node names do not resolve, Slurm knows the address.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\\n'*}
if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    address=$(scontrol show node "$MASTER_ADDR")
    address=${address#*NodeAddr=}
    MASTER_ADDR=${address%%[[:space:]]*}
fi
# A port that no outgoing connection can hold: below the kernel's ephemeral range, else above it.
read -r ephemeral_first ephemeral_last </proc/sys/net/ipv4/ip_local_port_range
first=15000 last=$((ephemeral_first - 1))
if ((last - first < 1000)); then first=$((ephemeral_last + 1)) last=65535; fi
if ((last - first < 1000)); then first=15000 last=32767; fi
MASTER_PORT=$((first + (SLURM_JOB_ID * 4099 + MEGABATCH_RESTART * 257) % (last - first + 1)))
for _ in {1..64}; do
    if ! (: </dev/tcp/127.0.0.1/"$MASTER_PORT") 2>/dev/null; then break; fi
    MASTER_PORT=$((MASTER_PORT < last ? MASTER_PORT + 1 : first))
done
export MASTER_ADDR MASTER_PORT""".splitlines()


def _rank_script(variables: list[Variable], profile: ClusterProfile) -> list[str]:
    """What each task runs before the rank's own command, held in a variable of the batch script."""
    caches = [v for v in variables if v.node_local]
    cache = [
        "# compiled kernels are loaded as code: the folder must belong to this user alone",
        f'cache={shell(profile.local_cache)}/megabatch-"$UID"',
        'mkdir -m 700 -- "$cache" 2>/dev/null || true',
        'if [ ! -d "$cache" ] || [ -L "$cache" ] || [ ! -O "$cache" ]; then cache=$(mktemp -d); fi',
        *(line for v in caches for line in (*_comment(v.reason), f'export {v.name}="$cache"/{shell(v.value)}')),
    ]
    return [
        "rank_script=$(cat <<'RANK'",
        "# a request to stop that comes before the rank listens must not end it: it finds the file then",
        "trap '' USR2",
        "trap : TERM",
        'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"',
        'exec >>"$MEGABATCH_RUN/logs/rank_$RANK.$MEGABATCH_RESTART.log" 2>&1',
        *(cache if caches else []),
        "status=0",
        '"$@" || status=$?',
        f"# an exit of {ExitCode.REQUEUE} would let --kill-on-bad-exit end ranks that are still closing their files",
        f'if [ "$status" -eq {ExitCode.REQUEUE} ]; then',
        '    if [ "$RANK" -eq 0 ]; then : >"$MEGABATCH_STOPPED"; fi',
        "    status=0",
        'elif [ "$status" -ne 0 ]; then',
        "    # srun gives the largest code, often of a rank it ended itself: the first to fail writes down its own",
        '    (set -C && echo "$RANK $status $SLURMD_NODENAME" >"$MEGABATCH_FAILED") 2>/dev/null || true',
        "fi",
        'exit "$status"',
        "RANK",
        ")",
    ]


def _launch(job: JobSpec, profile: ClusterProfile, *, exported: list[str]) -> list[str]:
    srun = ["srun", "--kill-on-bad-exit=1", *srun_flags(job, profile, exported=exported), *profile.srun]
    command = [*srun, "bash", "-c", "$rank_script", "rank", *inside(job, profile)]
    words = ['"$rank_script"' if word == "$rank_script" else shell(word) for word in command]
    return [
        "status=0",
        'if [ -z "$stop" ]; then',
        "    # a signal that comes before srun listens must not end it",
        f"    (trap '' USR2; exec {' '.join(words)}) &",
        "    srun_pid=$!",
        '    if [ -n "$stop" ]; then forward_stop; fi',
        "    while :; do",
        "        interrupted= status=0",
        '        wait "$srun_pid" || status=$?',
        '        if [ -z "$interrupted" ] || [ "$status" -le 128 ]; then break; fi',
        "    done",
        "else",
        '    : >"$MEGABATCH_STOPPED"',
        "fi",
    ]


def _finish(job: JobSpec) -> list[str]:
    resume = f"megabatch resume {shell(str(job.run_directory))}"
    refused = shell(f"megabatch: saved, but Slurm refused to requeue this job; run: {resume}")
    back = [
        "    # after TERM, Slurm or a person has decided already whether the job comes back",
        '    if [ "$stop" = USR2 ]; then',
        '        if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi',
        f"        echo {refused} >&2",
        "    fi",
    ]
    return [
        'rm -f -- "$MEGABATCH_STOP_REQUEST"',
        'if [ "$status" -eq 0 ] && [ -e "$MEGABATCH_STOPPED" ]; then',
        '    rm -f -- "$MEGABATCH_STOPPED"',
        f"    status={ExitCode.REQUEUE}",
        'elif [ "$status" -ne 0 ] && [ -e "$MEGABATCH_FAILED" ]; then',
        '    read -r rank status node <"$MEGABATCH_FAILED"',
        '    log="logs/rank_$rank.$MEGABATCH_RESTART.log"',
        '    echo "megabatch: rank $rank on $node failed first, with exit code $status: $log"',
        "fi",
        'printf \'{"job_id": "%s", "restart": %d, "exit_code": %d, "time": %d}\\n\' \\',
        '    "$SLURM_JOB_ID" "$MEGABATCH_RESTART" "$status" "$EPOCHSECONDS" >>"$MEGABATCH_RUN/jobs.jsonl" || true',
        *([f'if [ "$status" -eq {ExitCode.REQUEUE} ]; then', *back, "fi"] if job.requeue else []),
        'exit "$status"',
    ]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, width=118, initial_indent="# ", subsequent_indent="# ")
