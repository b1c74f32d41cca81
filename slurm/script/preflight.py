"""A short step before the ranks: each node is compared with its peers, and bad ones are left out from then on.

It is a separate step and not part of the ranks: it sees memory that another process left on a GPU before ours is
there, a node whose driver hangs can be named and ended from outside, and its imports fill the nodes' page cache for
the ranks.
"""

from __future__ import annotations

from dataclasses import replace

from megabatch.run_directory import FIRST_NODE_SILENT, ExitCode
from megabatch.slurm.container import inside, srun_flags
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell
from megabatch.slurm.roles import allocation
from megabatch.slurm.script.code import USE
from megabatch.slurm.script.gpus import of_step, without_the_jobs

_LIMIT_S = 320
"""Nodes end themselves earlier: only one stuck in the kernel is still running then."""


def preflight(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """The step and the actions on its verdict; empty for a job without a preflight."""
    if job.preflight == "none":
        return []
    words = " ".join(_step(job, profile))
    return [
        *_LEAVE_OUT,
        'preflight="$MEGABATCH_RUN/logs/preflight.$MEGABATCH_JOB_ID.$MEGABATCH_ATTEMPT" verdict= bad=',
        "export MEGABATCH_NODES=\"${nodes//$'\\n'/ }\"",
        "begin_patience",
        'if [ -z "$stop" ]; then',
        "    while :; do",
        "        # a request to stop meanwhile is acted on after it, before any rank starts",
        f"        (trap '' USR2; {without_the_jobs()}; exec {words}) &",
        "        preflight_pid=$!",
        "        while :; do",
        "            interrupted= status=0",
        '            wait "$preflight_pid" || status=$?',
        '            if [ -z "$interrupted" ] || [ "$status" -le 128 ]; then break; fi',
        "        done",
        '        if [ "$status" -eq 0 ] || [ -n "$stop" ] || ! cut_off; then break; fi',
        "    done",
        '    if [ -r "$preflight" ]; then read -r verdict bad <"$preflight" || true; fi',
        '    rm -f -- "$preflight"',
        f'    if [ -z "$verdict" ] && [ -z "$stop" ] && [ "$status" -eq {FIRST_NODE_SILENT} ]; then',
        f"        blame_first_node {job.max_bad_nodes}",
        '    elif [ -z "$verdict" ] && [ -z "$stop" ]; then',
        '        echo "megabatch: preflight ended with exit code $status and no verdict: continuing without it" >&2',
        "    fi",
        "fi",
        f'if [ "$verdict" = exclude ] && [ -z "$stop" ]; then {_without_bad_nodes(job)}; fi',
        'if [ "$verdict" = fail ] && [ -z "$stop" ]; then',
        '    echo "megabatch: preflight: not started on $bad; leave bad nodes out with \\`exclude\\` in the cluster'
        ' profile, or skip the preflight: --preflight none" >&2',
        f"    record_preflight {ExitCode.FAILED}",
        f"    exit {ExitCode.FAILED}",
        "fi",
    ]


def _without_bad_nodes(job: JobSpec) -> str:
    """How the run continues after bad nodes: in the same job, in its next link, or not at all."""
    if job.links > 1:
        return "leave_to_next_link"
    return "leave_out" if job.requeue else "verdict=fail"


def _step(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """Words of bash."""
    size = allocation(job)
    options = {
        "level": job.preflight,
        "gpus": size.gpus_per_node,
        "ranks": job.tasks_per_node,
        "local_cache": profile.local_cache,
        "max_bad_nodes": job.max_bad_nodes,
        "answer_s": job.preflight_answer_s,
    }
    arguments = ("-P", "-m", "megabatch.trainer.preflight", str(job.run_directory))
    words = (*arguments, *(f"--{name}={value}" for name, value in options.items()))
    step = replace(job, arguments=words, program=None)
    nodes = job.total_nodes
    one_each = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--wait={_LIMIT_S}"]
    gpus = of_step(size.gpus_per_node) if size.gpus_per_node else []
    srun = ["srun", *one_each, *gpus, *srun_flags(job, profile), *profile.srun]
    run = '"$own_code"' + shell(f'\n{USE} && exec "$@"')
    return [*map(shell, srun), "bash", "-c", run, "preflight", *map(shell, inside(step, profile))]


_LEAVE_OUT = """\
record_preflight() { record_ending "$1" ', "reason": "preflight: '"$bad"'"'; }
blame_first_node() {
    # the others live and it never answered them: it can judge nobody, itself least of all
    local before excluded=true
    before=$(grep -c '"job_id": "'"$MEGABATCH_JOB_ID"'".*"excluded": true' -- "$MEGABATCH_RUN/bad_nodes.jsonl" \\
        2>/dev/null) || true
    bad=${nodes%%$'\\n'*} verdict=exclude
    if [ "${before:-0}" -ge "$1" ]; then verdict=fail excluded=false; fi
    echo "megabatch: preflight: $bad: answer: none (the first node answers the others)"
    {
        printf '{"time": %d, "job_id": "%s", "attempt": %d, ' "$EPOCHSECONDS" "$MEGABATCH_JOB_ID" "$MEGABATCH_ATTEMPT"
        printf '"node": "%s", "check": "answer", "value": "none", "rule": "the first node answers the others", ' "$bad"
        printf '"excluded": %s}\\n' "$excluded"
    } >>"$MEGABATCH_RUN/bad_nodes.jsonl"
}
# the nodes that this job and the bad ones leave out, one a line; with too few others the verdict is a failure
find_excluded() {
    local known left=0 node
    # a job whose own list is not known may not get a new one
    if ! known=$(patiently scontrol --oneliner show job "$MEGABATCH_JOB_ID"); then
        echo "megabatch: preflight: Slurm does not say which nodes this job already excludes" >&2
        verdict=fail
        return
    fi
    excluded=${known##* ExcNodeList=}
    excluded=${excluded%% *}
    if [ "$excluded" = "(null)" ]; then excluded=$bad; else excluded="$excluded,$bad"; fi
    excluded=$(scontrol show hostnames "$excluded" | sort -u)
    while read -r node known; do
        case $known in down* | drain* | drng* | fail* | unk* | maint*) continue ;; esac
        if ! grep -qxF -- "$node" <<<"$excluded"; then left=$((left + 1)); fi
    done < <(
        patiently sinfo --noheader --Node --responding --partition="$SLURM_JOB_PARTITION" --format='%N %t' | sort -u
    )
    if [ "$left" -lt "$SLURM_JOB_NUM_NODES" ]; then
        echo "megabatch: preflight: without $bad partition $SLURM_JOB_PARTITION has only $left nodes" >&2
        verdict=fail
    fi
}
leave_out() {
    local excluded
    find_excluded
    if [ "$verdict" = fail ]; then return; fi
    # Slurm changes this list of a pending job alone, and a job is pending from its requeue on: this script then has
    # KillWait to live
    trap '' TERM
    record_preflight 75
    if patiently scontrol requeue "$MEGABATCH_JOB_ID"; then
        for _ in {1..20}; do
            if scontrol update JobId="$MEGABATCH_JOB_ID" ExcNodeList="${excluded//$'\\n'/,}"; then
                echo "megabatch: preflight: requeued without $bad"
                exit 0
            fi
            sleep 0.2
        done
        echo "megabatch: preflight: requeued, but Slurm may allocate $bad again" >&2
        exit 0
    fi
    verdict=fail
}
leave_to_next_link() {
    local excluded later link own=$MEGABATCH_JOB_ID
    find_excluded
    if [ "$verdict" = fail ]; then return; fi
    # those that were queued after this one
    later=$(awk -F '"' -v own="$own" '/"cluster": / { if (found) print $4; if ($4 == own) found = 1 }' \\
        "$MEGABATCH_RUN/jobs.jsonl") || true
    verdict=fail
    for link in $later; do
        if scontrol update JobId="$link" ExcNodeList="${excluded//$'\\n'/,}"; then verdict=exclude; fi
    done
    if [ "$verdict" = fail ]; then
        echo "megabatch: preflight: no later job of this run is queued to continue without $bad; queue some with:" \\
            "megabatch resume $(printf %q "$MEGABATCH_RUN") --chain N" >&2
        return
    fi
    record_preflight 75
    echo "megabatch: preflight: the next job of this run starts without $bad"
    exit 75
}""".splitlines()
