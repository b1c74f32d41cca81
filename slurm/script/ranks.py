"""What each task runs, and the srun that starts it."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.container import inside, srun_flags
from megabatch.slurm.environment import Variable
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell
from megabatch.slurm.script.code import USE
from megabatch.slurm.script.exit_codes import WRITE_ONCE
from megabatch.slurm.script.gpus import of_step, without_the_jobs
from megabatch.slurm.script.roles import step_size
from megabatch.slurm.script.variables import comment


def rank_script(variables: list[Variable]) -> list[str]:
    """Code that each task runs before the rank's own command, held in a variable of the batch script."""
    caches = [v for v in variables if v.node_local]
    cache = [
        "private_cache",
        *(line for v in caches for line in (*comment(v.reason), f'export {v.name}="$cache"/{shell(v.value)}')),
    ]
    return [
        "rank_script=$own_code$(cat <<'RANK'",
        "",
        "# signals that come before the rank listens must not end it: a request to stop is found as a file then",
        "trap '' USR1 USR2",
        "trap : TERM",
        *WRITE_ONCE.splitlines(),
        'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"',
        'exec >>"$MEGABATCH_RUN/logs/rank_$RANK.$MEGABATCH_ATTEMPT.log" 2>&1',
        *(cache if caches else []),
        "status=0",
        f'{USE} && "$@" || status=$?',
        f"# an exit of {ExitCode.REQUEUE} would let --kill-on-bad-exit end ranks that are still closing their files",
        f'if [ "$status" -eq {ExitCode.REQUEUE} ]; then',
        '    if [ "$RANK" -eq 0 ]; then : >"$MEGABATCH_STOPPED"; fi',
        "    status=0",
        'elif [ "$status" -eq 0 ]; then',
        '    if [ "$RANK" -eq 0 ]; then : >"$MEGABATCH_DONE"; fi',
        "else",
        "    # srun gives the largest code, often of a rank it ended itself: the first to fail writes down its own",
        '    write_once "$RANK $status $SLURMD_NODENAME" "$MEGABATCH_FAILED" "$RANK"',
        "fi",
        'exit "$status"',
        "RANK",
        ")",
    ]


def _size_beside_roles(job: JobSpec) -> list[str]:
    return step_size(
        job,
        nodes=job.nodes,
        tasks_per_node=job.tasks_per_node,
        gpus_per_node=job.gpus_per_node,
        cpus_per_task=job.cpus_per_task,
    )


def launch(job: JobSpec, profile: ClusterProfile) -> list[str]:
    per_task = bool(job.gpus_per_node) and profile.gpu_request == "gpus-per-task"
    size = _size_beside_roles(job) if job.roles else of_step(job.gpus_per_node) if per_task else []
    flags = " ".join(map(shell, [*size, *srun_flags(job, profile), *profile.srun]))
    place = '--nodelist="$rank_nodes" ' if job.roles else ""
    rank = " ".join(map(shell, inside(job, profile)))
    words = f'srun --kill-on-bad-exit=1 {place}{flags}{" " if flags else ""}bash -c "$rank_script" rank {rank}'
    own = f"{without_the_jobs()}; " if job.roles or per_task else ""
    return [
        f"status=0 started={'$role_failed' if job.roles else ''}",
        "begin_patience",
        'while [ -z "$stop" ] && [ -z "$started" ]; do',
        "    # a signal that comes before srun listens must not end it",
        f"    (trap '' USR1 USR2; {own}exec {words}) &",
        "    srun_pid=$!",
        "    watch_ranks &",
        "    watch_pid=$!",
        '    if [ -n "$stop" ]; then forward_stop; fi',
        "    while :; do",
        "        interrupted= status=0",
        '        wait "$srun_pid" || status=$?',
        '        if [ -z "$interrupted" ] || [ "$status" -le 128 ]; then break; fi',
        "    done",
        '    kill "$watch_pid" 2>/dev/null || true',
        '    if [ "$status" -ne 0 ] && cut_off; then srun_pid= status=0; else started=1; fi',
        "done",
        'if [ -z "$started" ]; then : >"$MEGABATCH_STOPPED"; fi',
    ]
