"""Stop requests, and the files through which script, ranks and launcher communicate them."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.quoting import shell
from megabatch.slurm.script.exit_codes import WRITE_ONCE

_PATIENCE_S = 45
"""Longer than a restart of the controller, shorter than the time that `signal_delay_s` usually leaves."""

NO_ANSWER = (
    "Unable to contact slurm controller|Connection (reset|refused|timed out)|Socket timed out|Zero Bytes|Broken pipe"
    "|Transport endpoint|Unexpected missing socket|Communication |Message (send|receive) failure"
    "|Slurm backup controller in standby"
)
"""What Slurm's commands say of a controller that is being restarted or replaced (slurm_errno.c)."""

STOP_HANDLING = (
    """\
# USR2 is the time limit's warning; TERM is scancel, preemption or an operator's requeue. srun passes USR2 on to the
# ranks and TERM not, so both go on as USR2; a rank that does not listen yet finds the file.
stop= interrupted= srun_pid=
ask_to_stop() {
    if [ "$1" = TERM ] || [ -z "$stop" ]; then stop=$1; fi
    interrupted=1
    if [ -n "$srun_pid" ]; then forward_stop; fi
}
forward_stop() {
    echo "$stop" >"$MEGABATCH_STOP_REQUEST" || true
    kill -USR2 "$srun_pid" 2>/dev/null || true
}
trap 'ask_to_stop USR2' USR2
trap 'ask_to_stop TERM' TERM
# a controller that is being restarted does not answer for a while
patiently() {
    local last=$((SECONDS + PATIENCE))
    until "$@"; do
        if [ "$SECONDS" -ge "$last" ] || [ "$stop" = TERM ]; then return 1; fi
        sleep 1
    done
}
# srun asks the controller for its step but once: whether it was sent away, before any task began
cut_off() {
    if [ "$SECONDS" -ge "$patience" ]; then return 1; fi
    tail -n 3 -- "$MEGABATCH_RUN/logs/batch.$MEGABATCH_JOB_ID.log" 2>/dev/null | grep -qE -- CUT_OFF || return 1
    echo "megabatch: the controller did not answer srun: trying again"
    # it may have made the step, and count it as one that holds the job's CPUs and GPUs
    export SLURM_OVERLAP=1
    sleep 1
}
begin_patience() { patience=$((SECONDS + PATIENCE)); }
WRITE_ONCE""".replace("PATIENCE", str(_PATIENCE_S))
    .replace(
        "CUT_OFF", shell(rf"^srun: error: Unable to (create step|confirm allocation) for job [0-9]+: ({NO_ANSWER})")
    )
    .replace("WRITE_ONCE", WRITE_ONCE)
    .splitlines()
)


_MARKERS = {
    "MEGABATCH_STOP_REQUEST": "stop",
    "MEGABATCH_STOPPED": "stopped",
    "MEGABATCH_DONE": "done",
    "MEGABATCH_FAILED": "failed",
}

LAST_WORD = f"""\
# exit code, more keys: how this attempt ended, once, however the script ends
recorded=
record_ending() {{
    recorded=1
    printf '{{"job_id": "%s", "attempt": %d, "exit_code": %d, "time": %d%s}}\\n' \\
        "$MEGABATCH_JOB_ID" "$MEGABATCH_ATTEMPT" "$1" "$EPOCHSECONDS" "${{2:-}}" >>"$MEGABATCH_RUN/jobs.jsonl" || true
}}
last_word() {{
    local code=$?
    if [ -n "$recorded" ]; then return; fi
    # neither done nor saved, whatever a line of the site's own says
    case "$code" in {ExitCode.DONE} | {ExitCode.REQUEUE}) code={ExitCode.FAILED} ;; esac
    echo "megabatch: the job script ended early, with exit code $code, at: $BASH_COMMAND" >&2
    record_ending "$code"
    exit "$code"
}}""".splitlines()
"""`record_ending`, and the message of an unexpected exit."""


def run_directory(job: JobSpec) -> list[str]:
    return [
        f"export MEGABATCH_RUN={shell(str(job.run_directory))}",
        "# whoever owns these decides what the job does; in a folder that others may write they can be replaced",
        'for own in "$MEGABATCH_RUN" "$MEGABATCH_RUN/run.json"; do',
        '    if [ -e "$own" ] && [ ! -O "$own" ]; then',
        '        echo "megabatch: not run: $own belongs to another user" >&2',
        f"        exit {ExitCode.CONFIG}",
        "    fi",
        "done",
        'mkdir -p -- "$MEGABATCH_RUN/logs"',
        "# an element of an array goes by the name that people see in squeue",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        'export MEGABATCH_JOB_ID="${job:-$SLURM_JOB_ID}"',
        "# attempts count over the run, not the job: a resumed run must not write into the logs of an earlier job",
        'MEGABATCH_ATTEMPT=$(grep -c \'"start": \' -- "$MEGABATCH_RUN/jobs.jsonl" 2>/dev/null) || true',
        'export MEGABATCH_ATTEMPT="${MEGABATCH_ATTEMPT:-0}"',
        "# asked to stop, stopped with everything saved, rank 0 done, and who failed first",
        *(
            f'export {name}="$MEGABATCH_RUN/logs/{file}.$MEGABATCH_JOB_ID.$MEGABATCH_ATTEMPT"'
            for name, file in _MARKERS.items()
        ),
        *LAST_WORD,
        'newest_checkpoint() { cat -- "$MEGABATCH_RUN/checkpoints/latest" 2>/dev/null || true; }',
        "began_with=$(newest_checkpoint)",
        'printf \'{"job_id": "%s", "attempt": %d, "start": %d, "nodes": "%s"}\\n\' \\',
        '    "$MEGABATCH_JOB_ID" "$MEGABATCH_ATTEMPT" "$EPOCHSECONDS" "$SLURM_JOB_NODELIST" \\',
        '    >>"$MEGABATCH_RUN/jobs.jsonl" || true',
        "trap last_word EXIT",
        "# the batch log holds all attempts of this job: this line begins what belongs to this one",
        'echo "megabatch: attempt $MEGABATCH_ATTEMPT of job $MEGABATCH_JOB_ID on $SLURM_JOB_NODELIST"',
    ]
