"""The end of the batch script: the first failure, the record, the requeue."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell
from megabatch.slurm.script.exit_codes import MAY_PASS
from megabatch.slurm.script.links import last_link


def finish(job: JobSpec) -> list[str]:
    return [
        "# srun ends with 0 too where a node failed",
        'if [ "$status" -eq 0 ] && [ ! -e "$MEGABATCH_DONE" ] && [ ! -e "$MEGABATCH_STOPPED" ]; then',
        f"    status={ExitCode.FAILED}",
        "fi",
        'rm -f -- "$MEGABATCH_STOP_REQUEST" "$MEGABATCH_DONE"',
        "may_pass=",
        'if [ "$status" -eq 0 ] && [ -e "$MEGABATCH_STOPPED" ]; then',
        '    rm -f -- "$MEGABATCH_STOPPED"',
        f"    status={ExitCode.REQUEUE} may_pass=1",
        'elif [ "$status" -ne 0 ] && read -r rank code node 2>/dev/null <"$MEGABATCH_FAILED" &&',
        '    [ -n "$node" ]; then',
        "    status=$code",
        '    log="logs/rank_$rank.$MEGABATCH_ATTEMPT.log"',
        '    echo "megabatch: rank $rank on $node failed first, with exit code $status: $log"',
        "    # crashes, hangs and deaths by a signal; what has an error message of its own would only come again",
        f'    case "$status" in {MAY_PASS}) may_pass=1 ;; esac',
        'elif [ "$status" -ne 0 ]; then',
        "    # srun or a node is gone, unless srun was never there",
        '    echo "megabatch: no rank left an exit code; srun ended with exit code $status"',
        f"    may_pass={'$role_may_pass' if job.roles else 1}",
        '    case "$status" in 126 | 127) may_pass= ;; esac',
        "fi",
        "# before TERM slurmd writes to the job's output what it comes of; scancel gives no reason. Slurm's commands",
        "# say COMPLETING as long as this script runs, and forget the job later",
        "cancelled() {",
        "    local log=$MEGABATCH_RUN/logs/batch.$SLURM_JOB_ID.log",
        '    if [ -n "$job" ]; then log=$MEGABATCH_ARRAY_LOG; fi',
        '    [ "$stop" = TERM ] &&',
        '        grep -q "\\*\\*\\* JOB $SLURM_JOB_ID ON .* CANCELLED AT [^ ]* \\*\\*\\*" -- "$log" 2>/dev/null',
        "}",
        'if cancelled; then record_ending "$status" \', "cancelled": true\'; else record_ending "$status"; fi',
        *(_requeue(job) if job.requeue else []),
        *last_link(job),
        'exit "$status"',
    ]


def _requeue(job: JobSpec) -> list[str]:
    """Requeues if that may help, unless attempts follow each other without progress."""
    resume = f"megabatch resume {shell(str(job.run_directory))}"
    allowed = job.max_requeues_without_progress
    return [
        "# after TERM, and once Slurm gave this attempt up for another, it is decided whether the job comes back",
        "still_ours() {",
        '    job_now=$(patiently scontrol --oneliner show job "$MEGABATCH_JOB_ID") &&',
        '        [[ "$job_now " = *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]',
        "}",
        'if [ -n "$may_pass" ] && [ "$stop" != TERM ] && ! still_ours; then',
        '    echo "megabatch: not requeued: Slurm has replaced this attempt by another, or does not answer" >&2',
        'elif [ -n "$may_pass" ] && [ "$stop" != TERM ]; then',
        "    # attempts in a row that ended with the checkpoint they began with; `megabatch resume` counts anew",
        "    fruitless=0 count=$MEGABATCH_RUN/logs/fruitless.$MEGABATCH_JOB_ID newest=$(newest_checkpoint)",
        '    if [ "$newest" = "$began_with" ]; then',
        '        read -r fruitless 2>/dev/null <"$count" || true',
        "        # bash runs what a number holds in brackets",
        '        case "$fruitless" in *[!0-9]* | "") fruitless=0 ;; esac',
        "        fruitless=$((10#$fruitless + 1))",
        "    fi",
        f'    if [ "$fruitless" -gt {allowed} ]; then',
        '        echo "megabatch: not requeued: $fruitless attempts in a row ended without a checkpoint newer than'
        ' ${newest:-none}" >&2',
        '    elif ! echo "$fruitless" >"$count"; then',
        '        echo "megabatch: not requeued: $count cannot be written" >&2',
        '    elif [[ "$job_now " != *" Requeue=0 "* ]] && patiently scontrol requeue "$MEGABATCH_JOB_ID"; then',
        "        exit 0",
        "    else",
        '        echo "megabatch: Slurm refused to requeue this job; if it always does, submit with --chain N" >&2',
        "    fi",
        f"    echo {shell(f'megabatch: resume with: {resume}')} >&2",
        "fi",
    ]
