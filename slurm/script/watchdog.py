"""The watchdog of the ranks while srun runs them: for a hang, and for ranks that do not save in time."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.hang import ANSWER_S, START_FACTOR, SUSPECT
from megabatch.slurm.job import JobSpec


def watchdog(job: JobSpec) -> list[str]:
    hang_s = round(job.hang_timeout_s)
    hung = [
        "        # seconds are counted by the tick: a job that was suspended has not hung",
        '        if [ "$beat" != "$last" ]; then idle=0 last=$beat; else idle=$((idle + 1)); fi',
        f"        limit={hang_s}",
        f'        case "$beat" in "$first" | *\'"state": "starting"\'*) limit={START_FACTOR * hang_s} ;; esac',
        '        if [ "$idle" -ge "$limit" ]; then',
        '            echo "megabatch: no heartbeat for $idle s; every rank writes its stacks to its log"',
        '            kill -USR1 "$srun_pid"',
        f'            read -rt {ANSWER_S} -u "$tick" || true',
        "            read -r rank why < <(find_suspect) || true",
        '            node=$(sed -n "$((rank / LOCAL_WORLD_SIZE + 1))p" <<<"$nodes")',
        '            echo "megabatch: the run hangs; rank $rank on $node $why"',
        f'            write_once "$rank {ExitCode.HUNG} $node" "$MEGABATCH_FAILED" watch',
        '            kill -TERM "$srun_pid"',
        "            return",
        "        fi",
    ]
    return [
        "# Runs beside srun, outside the ranks: one that is stopped, or stuck in a call, cannot watch itself.",
        "find_suspect() {",
        f"    awk -v world=\"$WORLD_SIZE\" '{SUSPECT}' \\",
        '        "$MEGABATCH_RUN"/logs/rank_*."$MEGABATCH_ATTEMPT".log',
        "}",
        "watch_ranks() {",
        "    local beat first last idle=0 limit asked=0 request tick rank why node",
        "    heartbeat=$MEGABATCH_RUN/heartbeat.json",
        '    first=$(cat -- "$heartbeat" 2>/dev/null) || true',
        "    last=$first",
        "    # a pipe that stays empty: reading from it waits without a process that could be left behind",
        "    exec {tick}<> <(:)",
        "    while :; do",
        '        read -rt 1 -u "$tick" || true',
        '        request=$(cat -- "$MEGABATCH_STOP_REQUEST" 2>/dev/null) || true',
        '        if [ "$request" = USR2 ]; then asked=$((asked + 1)); fi',
        f'        if [ "$asked" -ge {_save_s(job)} ]; then',
        '            echo "megabatch: the ranks have not saved in $asked s; ending them before the time limit does"',
        '            kill -TERM "$srun_pid"',
        "            return",
        "        fi",
        *(['        beat=$(cat -- "$heartbeat" 2>/dev/null) || true', *hung] if hang_s else []),
        "    done",
        "}",
    ]


def _save_s(job: JobSpec) -> int:
    """How long the ranks may take to save after the warning, so that the script can finish before Slurm kills it."""
    return max(1, job.signal_delay_s - min(10, max(1, job.signal_delay_s // 4)))
