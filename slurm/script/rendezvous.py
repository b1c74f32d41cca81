"""Where the ranks meet: address and port of rank 0."""

from __future__ import annotations

RENDEZVOUS = """\
# Rank 0 runs on the first node; where node names do not resolve, Slurm knows the address.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\\n'*}
if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    address=$(patiently scontrol show node "$MASTER_ADDR")
    address=${address#*NodeAddr=}
    MASTER_ADDR=${address%%[[:space:]]*}
fi
# A port that no outgoing connection can hold: below the kernel's ephemeral range, else above it.
read -r ephemeral_first ephemeral_last </proc/sys/net/ipv4/ip_local_port_range
first=15000 last=$((ephemeral_first - 1))
if ((last - first < 1000)); then first=$((ephemeral_last + 1)) last=65535; fi
if ((last - first < 1000)); then first=15000 last=32767; fi
MASTER_PORT=$((first + (SLURM_JOB_ID * 4099 + MEGABATCH_ATTEMPT * 257) % (last - first + 1)))
for _ in {1..64}; do
    if ! (: </dev/tcp/127.0.0.1/"$MASTER_PORT") 2>/dev/null; then break; fi
    MASTER_PORT=$((MASTER_PORT < last ? MASTER_PORT + 1 : first))
done
export MASTER_ADDR MASTER_PORT""".splitlines()
