"""Environment presets: each variable with its value and reason.

The reason becomes the comment above the export in the job script, and the tables of docs/slurm.md are printed by
`python -m megabatch.slurm.environment`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile, Network
from megabatch.slurm.sbatch_options import overriding
from megabatch.values import dataclass


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable of the ranks."""

    name: str
    value: str
    """Literal value; for a node-local variable the folder's name inside the node's cache folder."""
    reason: str
    node_local: bool = False
    """Set on each node, beneath a folder on the node's own disk that only this user can write."""


PROCESS = (
    Variable("PYTHONUNBUFFERED", "1", "a rank's last lines reach its log even when it is killed"),
    Variable("PYTHONFAULTHANDLER", "1", "a crash in native code leaves the Python stack in the log"),
    Variable("TOKENIZERS_PARALLELISM", "false", "tokenizer threads would multiply with ranks and data workers"),
)

GPU = (
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "sequence lengths vary, and fixed segments fragment until an allocation fails with memory still free "
        "(torch >= 2.9 also takes PYTORCH_ALLOC_CONF; every supported torch reads this name, and reads it first)",
    ),
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "one hardware queue keeps kernels in launch order, which megatron-core relies on to start tensor- and "
        "sequence-parallel communication before the matrix product it overlaps",
    ),
    Variable("NCCL_DEBUG", "WARN", "NCCL's errors name their cause in the log; INFO would log thousands of lines"),
    Variable(
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "2000",
        "keeps the last collectives of each rank, so that a hang can be traced to the rank that did not join",
    ),
    Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "writes that record when a collective times out"),
)

NETWORKS: dict[Network, tuple[Variable, ...]] = {
    "none": (),
    "single_node": (
        Variable("NCCL_SOCKET_IFNAME", "lo", "ranks meet on loopback, which no firewall or lost link can block"),
        Variable("GLOO_SOCKET_IFNAME", "lo", "the same for gloo, used for checkpoints and CPU tensors"),
        Variable("NCCL_IB_DISABLE", "1", "does not probe network cards that a one-node job never uses"),
    ),
    "ethernet": (
        Variable("NCCL_SOCKET_IFNAME", "^lo,docker,virbr,veth", "excludes interfaces that other nodes cannot reach"),
        Variable("NCCL_IB_DISABLE", "1", "plain TCP was requested: does not probe RDMA devices"),
    ),
    "infiniband": (
        Variable("NCCL_NET", "IB", "without working InfiniBand NCCL fails at once instead of crawling over TCP"),
        Variable(
            "NCCL_SOCKET_IFNAME", "^lo,docker,virbr,veth", "bootstrap uses interfaces that other nodes can reach"
        ),
        Variable(
            "NCCL_IB_TIMEOUT",
            "22",
            "4.096 us * 2^22 = 17 s per try: a link flap or switch reroute on a large fabric does not end the job",
        ),
        Variable("NCCL_IB_RETRY_CNT", "7", "the largest number of tries that the verbs interface allows"),
    ),
    "roce": (
        Variable(
            "NCCL_NET", "IB", "RoCE uses the same verbs transport; without it NCCL fails instead of crawling over TCP"
        ),
        Variable(
            "NCCL_SOCKET_IFNAME", "^lo,docker,virbr,veth", "bootstrap uses interfaces that other nodes can reach"
        ),
        Variable("NCCL_IB_ROCE_VERSION_NUM", "2", "routable RoCE v2: NCCL then picks the matching GID by itself"),
        Variable(
            "NCCL_IB_TC",
            "106",
            "DSCP 26 with ECN, the class that lossless fabrics commonly map to PFC priority 3; ask your site",
        ),
        Variable("NCCL_IB_TIMEOUT", "22", "17 s per try survives a link flap"),
        Variable("NCCL_IB_RETRY_CNT", "7", "the largest number of tries that the verbs interface allows"),
    ),
    "efa": (
        Variable("FI_PROVIDER", "efa", "libfabric takes the Elastic Fabric Adapter or fails, never plain TCP"),
        Variable(
            "NCCL_SOCKET_IFNAME", "^lo,docker,virbr,veth", "bootstrap uses interfaces that other nodes can reach"
        ),
        Variable(
            "FI_EFA_USE_HUGE_PAGE",
            "0",
            "huge pages held by libfabric make fork fail with `Cannot allocate memory` in data workers",
        ),
        Variable(
            "FI_EFA_FORK_SAFE", "1", "otherwise kernels before 5.15 corrupt registered memory in forked data workers"
        ),
    ),
}

SHARED_CACHES = (
    Variable("HF_HOME", "huggingface", "models, datasets and tokens of the hub are downloaded once for all nodes"),
    Variable("HF_DATASETS_CACHE", "huggingface/datasets", "tokenised and mapped datasets are shared between runs"),
    Variable("MODELSCOPE_CACHE", "modelscope", "the same for downloads from ModelScope"),
    Variable("MEGABATCH_CACHE", "megabatch", "datasets are tokenised once and shared between runs"),
    Variable("TORCH_HOME", "torch", "the same for torch.hub"),
)

NODE_CACHES = (
    Variable(
        "TRITON_CACHE_DIR", "triton", "thousands of small files with locks: slow and racy on a network disk", True
    ),
    Variable("TORCHINDUCTOR_CACHE_DIR", "inductor", "the same for compiled graphs", True),
    Variable("TORCH_EXTENSIONS_DIR", "extensions", "extensions are built for this node's compiler and GPU", True),
    Variable("CUDA_CACHE_PATH", "cuda", "the driver's compiled kernels; the default is the home folder", True),
)


def job_variables(job: JobSpec, profile: ClusterProfile) -> list[Variable]:
    """All variables of a job's ranks, each name once: the recipe wins over the profile, and that over the presets."""
    presets: list[Variable] = [*PROCESS, _threads(job)]
    if job.gpus_per_node:
        presets += [*GPU, *NETWORKS["single_node" if job.total_nodes == 1 else profile.network], *NODE_CACHES]
    elif job.total_nodes == 1:
        presets += [v for v in NETWORKS["single_node"] if v.name == "GLOO_SOCKET_IFNAME"]
    if profile.shared_cache:
        presets += [Variable(v.name, f"{profile.shared_cache}/{v.value}", v.reason) for v in SHARED_CACHES]
    return _last_wins(
        [
            *presets,
            *(Variable(name, value, "from the cluster profile") for name, value in profile.environment.items()),
            *(Variable(name, value, "from the recipe") for name, value in job.environment.items()),
        ]
    )


def _threads(job: JobSpec) -> Variable:
    threads = job.omp_num_threads or job.cpus_per_task or 1
    return Variable("OMP_NUM_THREADS", str(threads), "this rank's own cores: the default is the whole node's")


def _last_wins(variables: Iterable[Variable]) -> list[Variable]:
    chosen: dict[str, Variable] = {}
    for variable in variables:
        chosen[variable.name] = variable
    return list(chosen.values())


def for_sbatch(environment: Mapping[str, str], script: str) -> dict[str, str]:
    """sbatch's environment, without the Slurm job that we may be in and without variables that override the script."""
    ours = ("SLURM_CONF", "SLURM_JWT")
    inside = "SLURM_JOB_ID" in environment
    hidden = {k for k in environment if inside and k.startswith(("SLURM_", "SRUN_")) and k not in ours}
    hidden |= overriding(environment, script)
    return {name: value for name, value in environment.items() if name not in hidden}


def reference_table() -> str:
    """The presets as Markdown tables, one per preset."""
    presets: dict[str, tuple[Variable, ...]] = {"Every job": PROCESS, "Every GPU job": GPU}
    presets |= {f"Network `{name}`": variables for name, variables in NETWORKS.items() if variables}
    presets |= {"Beneath `shared_cache`": SHARED_CACHES, "On each node, beneath `local_cache` (GPU jobs)": NODE_CACHES}
    lines: list[str] = []
    for title, variables in presets.items():
        lines += [f"### {title}", "", "| variable | value | reason |", "| --- | --- | --- |"]
        lines += [f"| `{v.name}` | `{v.value}` | {v.reason} |" for v in variables]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference_table(), end="")
