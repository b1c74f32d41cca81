"""How the batch script ends: who failed first, the record, and back into the queue."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell


def finish(job: JobSpec) -> list[str]:
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
        '    "$MEGABATCH_JOB_ID" "$MEGABATCH_RESTART" "$status" "$EPOCHSECONDS" >>"$MEGABATCH_RUN/jobs.jsonl" || true',
        *([f'if [ "$status" -eq {ExitCode.REQUEUE} ]; then', *back, "fi"] if job.requeue else []),
        'exit "$status"',
    ]
