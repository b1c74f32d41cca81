"""Servers beside the ranks: started and found healthy before them, watched with them, stopped after them."""

from __future__ import annotations

from megabatch.config.roles import Role
from megabatch.slurm.container import inside, srun_flags
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell
from megabatch.slurm.roles import allocation, role_job
from megabatch.slurm.script.exit_codes import OF_SIGNAL, WRITE_ONCE
from megabatch.slurm.script.gpus import of_step, without_the_jobs

LAST_LINES = 20
"""Lines of a server's log that the batch log shows when it fails."""
GRACE_S = 10
"""Time for a server to end by itself after the ranks."""


def start_roles(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """Starts each role on its nodes and waits until every server is healthy; nothing for a job without roles."""
    if not job.roles:
        return []
    lines = [*_FUNCTIONS, *_ROLE_SCRIPT, f"rank_nodes=$(node_list 0 {job.nodes})"]
    first = job.nodes
    for role in job.roles:
        lines += _start(job, profile, role, first=first)
        first += role.nodes
    lines.append("begin_patience")
    for role in job.roles:
        lines.append(f"wait_for_role {role.name} {role.tasks} {shell(role.health)} {role.ready_s}")
    return [*lines, "watch_roles &", "role_watch_pid=$!"]


def end_roles(job: JobSpec) -> list[str]:
    """After the ranks: stops the servers; if one failed on its own, that is the cause of the job's failure."""
    return [f"end_roles {GRACE_S}"] if job.roles else []


def step_size(
    job: JobSpec, *, nodes: int, tasks_per_node: int, gpus_per_node: int, cpus_per_task: int | None
) -> list[str]:
    """srun's options for a step on some of the job's nodes; without them it would inherit those of the whole job."""
    flags = [f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"]
    if cpus_per_task is not None:
        flags.append(f"--cpus-per-task={cpus_per_task}")
    return [*flags, *(of_step(gpus_per_node) if allocation(job).gpus_per_node else [])]


def _start(job: JobSpec, profile: ClusterProfile, role: Role, *, first: int) -> list[str]:
    own = role_job(job, role)
    size = step_size(
        job,
        nodes=role.nodes,
        tasks_per_node=role.tasks_per_node,
        gpus_per_node=role.gpus_per_node,
        cpus_per_task=role.cpus_per_task,
    )
    flags = " ".join(map(shell, [*size, *srun_flags(own, profile), *profile.srun]))
    command = " ".join(map(shell, inside(own, profile)))
    return [
        f"start_{role.name}() {{",
        f'    (trap "" USR1 USR2; unset SRUN_CPUS_PER_TASK; {without_the_jobs()}; export MEGABATCH_ROLE={role.name}',
        f'    exec srun --kill-on-bad-exit=1 --nodelist="$(node_list {first} {role.nodes})" {flags} \\',
        f'        bash -c "$role_script" role {command}) &',
        f"    role_pids[{role.name}]=$!",
        "}",
        f'if [ -z "$stop" ]; then start_{role.name}; fi',
    ]


_FUNCTIONS = (
    r"""
# Servers have the nodes after those of the ranks. Whoever knows the token may use them: it is made here, and goes to
# servers and ranks by their environment alone.
MEGABATCH_ROLE_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MEGABATCH_ROLE_TOKEN MEGABATCH_ROLE_PORTS="$first $last"
declare -A role_pids=()
role_failed= role_may_pass=1 ranks_ended= role_watch_pid=
exec {role_tick}<> <(:)
mapfile -t hosts <<<"$nodes"
node_list() {
    local IFS=,
    echo "${hosts[*]:$1:$2}"
}
address_of() {
    local known
    if getent hosts "$1" >/dev/null; then echo "$1"; return; fi
    known=$(patiently scontrol show node "$1")
    known=${known#*NodeAddr=}
    echo "${known%%[[:space:]]*}"
}
role_place() { echo "$MEGABATCH_RUN/logs/$1_$2.$MEGABATCH_JOB_ID.$MEGABATCH_ATTEMPT"; }
# name, task, what happened, exit code: the job will have failed of this server
role_fails() {
    local name=$1 task=$2 node port log
    read -r node port 2>/dev/null <"$(role_place "$name" "$task")" || true
    log="logs/${name}_$task.$MEGABATCH_ATTEMPT.log"
    echo "megabatch: role $name, task $task${node:+ on $node} $3: $log"
    tail -n LAST_LINES -- "$MEGABATCH_RUN/$log" 2>/dev/null | sed 's/^/    /' || true
    role_failed=$4
}
# a role's srun is gone although nobody asked: the first task to end wrote down its exit code
role_is_gone() {
    local name=$1 task=0 code=0
    if ! read -r task code 2>/dev/null <"$(role_place "$name" ended)"; then
        task=0 code=0
        wait "${role_pids[$name]}" || code=$?
    fi
    # bash runs what a number holds in brackets
    case "$code" in *[!0-9]* | "") code=1 ;; esac
    role_fails "$name" "$task" "ended with exit code $code $2" "$((code ? code : 1))"
}
healthy() {
    # bash's own TCP: there may be no curl here, and the token is on no command line
    timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1" &&
        printf "%s\r\n" "GET $2 HTTP/1.0" "Host: $0:$1" "Authorization: Bearer $MEGABATCH_ROLE_TOKEN" "" >&3 &&
        read -r _ code _ <&3 && { read -rd "" -t 1 _ <&3 || true; } && [ "$code" = 200 ]' "$@" 2>/dev/null
}
# name, servers, path, seconds
wait_for_role() {
    local name=$1 task node port address urls='' end=$((SECONDS + $4))
    for ((task = 0; task < $2; task++)); do
        while :; do
            if [ -n "$stop" ] || [ -n "$role_failed" ]; then return; fi
            node= port=
            read -r node port 2>/dev/null <"$(role_place "$name" "$task")" || true
            if [ -n "$port" ]; then
                address=$(address_of "$node")
                if healthy "$address" "$port" "$3"; then break; fi
            fi
            if ! kill -0 "${role_pids[$name]}" 2>/dev/null; then
                if cut_off; then "start_$name"; continue; fi
                role_is_gone "$name" "before it was ready"
                # what ended with a message of its own would only end so again
                case "$role_failed" in OF_SIGNAL) ;; *) role_may_pass= ;; esac
                return
            fi
            if [ "$SECONDS" -ge "$end" ]; then
                role_fails "$name" "$task" "did not answer $3 within $4 s" 1
                role_may_pass=
                return
            fi
            read -rt 0.5 -u "$role_tick" || true
        done
        urls+="${urls:+,}http://$address:$port"
    done
    export "MEGABATCH_ROLE_${name^^}=$urls"
}
watch_roles() {
    local pid
    while :; do
        for pid in "${role_pids[@]}"; do
            if ! kill -0 "$pid" 2>/dev/null; then kill -USR1 $$; return; fi
        done
        read -rt 0.5 -u "$role_tick" || true
    done
}
a_role_ended() {
    local name
    # in a trap a bare `return` gives the status of what the signal interrupted
    if [ -n "$ranks_ended" ] || [ -n "$role_failed" ] || [ -n "$stop" ]; then return 0; fi
    for name in "${!role_pids[@]}"; do
        if ! kill -0 "${role_pids[$name]}" 2>/dev/null; then
            role_is_gone "$name" "while the ranks ran; they are asked to save"
            ask_to_stop USR2
            return 0
        fi
    done
}
trap a_role_ended USR1
end_roles() {
    local pid end
    # ranks that fail because their server did may end before it is noticed
    if [ "$status" -ne 0 ] && [ -z "$role_failed" ]; then a_role_ended; fi
    ranks_ended=1
    kill "$role_watch_pid" 2>/dev/null || true
    for pid in "${role_pids[@]}"; do kill -USR2 "$pid" 2>/dev/null || true; done
    end=$((SECONDS + $1))
    for pid in "${role_pids[@]}"; do
        while kill -0 "$pid" 2>/dev/null; do
            if [ "$SECONDS" -ge "$end" ]; then kill -TERM "$pid" 2>/dev/null || true; fi # srun kills its tasks then
            if [ "$SECONDS" -ge "$((end + $1))" ]; then kill -KILL "$pid" 2>/dev/null || true; fi
            read -rt 0.2 -u "$role_tick" || true
        done
    done
    rm -f -- "$MEGABATCH_RUN"/logs/*_*."$MEGABATCH_JOB_ID.$MEGABATCH_ATTEMPT"
    if [ -n "$role_failed" ]; then
        status=$role_failed
        rm -f -- "$MEGABATCH_STOPPED" "$MEGABATCH_FAILED"
    fi
}
""".replace("LAST_LINES", str(LAST_LINES))
    .replace("OF_SIGNAL", OF_SIGNAL)
    .strip()
    .splitlines()
)

_ROLE_SCRIPT = (
    r"""
role_script=$own_code$(cat <<'ROLE'

WRITE_ONCE
server= asked=
trap '' USR1
trap 'asked=1; if [ -n "$server" ]; then kill -TERM "$server"; fi' USR2
trap : TERM
place="$MEGABATCH_RUN/logs/${MEGABATCH_ROLE}_"
exec >>"$place$SLURM_PROCID.$MEGABATCH_ATTEMPT.log" 2>&1
# libraries take these for their own
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
read -r first last <<<"$MEGABATCH_ROLE_PORTS"
port=$((SLURM_JOB_ID * 4099 + MEGABATCH_ATTEMPT * 257 + (SLURM_STEP_ID + 1) * 521 + SLURM_PROCID * 37))
port=$((first + port % (last - first + 1)))
for _ in {1..64}; do
    if ! (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then break; fi
    port=$((port < last ? port + 1 : first))
done
export MEGABATCH_ROLE_PORT=$port MEGABATCH_ROLE_TASK=$SLURM_PROCID
id=$MEGABATCH_JOB_ID.$MEGABATCH_ATTEMPT
echo "$SLURMD_NODENAME $port" >"$place$SLURM_PROCID.$id.new"
mv -- "$place$SLURM_PROCID.$id.new" "$place$SLURM_PROCID.$id"
status=0
use_code || status=$?
if [ "$status" -ne 0 ]; then
    write_once "$SLURM_PROCID $status" "${place}ended.$id" "$SLURM_PROCID"
    exit "$status"
fi
(trap '' USR1 USR2; exec "$@") &
server=$!
if [ -n "$asked" ]; then kill -TERM "$server"; fi
while :; do
    status=0
    wait "$server" || status=$?
    if ! kill -0 "$server" 2>/dev/null; then break; fi
done
if [ -n "$asked" ]; then exit 0; fi
write_once "$SLURM_PROCID $status" "${place}ended.$id" "$SLURM_PROCID"
exit "$((status ? status : 1))"
ROLE
)
""".replace("WRITE_ONCE", WRITE_ONCE)
    .strip()
    .splitlines()
)
