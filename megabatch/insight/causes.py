"""What logs say when a run dies: patterns, the class of failure behind each, and what to do about it.

Pure data, in the order in which a cause is believed: of the rows that match anywhere in the logs of a start, the first
one names it. Rows that are a consequence come last: whoever says only that a peer has gone, or that it waited in vain,
died of another rank's failure. tests/insight/excerpts.txt holds what torch, NCCL, gloo, Slurm and others print for
each row, and where that text comes from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """One way to fail."""

    name: str
    """Stable, for programs; what it means stands in `title`."""
    title: str
    pattern: str
    """Of one line; Python's regular expressions."""
    fix: str
    consequence: bool = False
    """Said by ranks that another rank's failure took along."""


_EXCLUDE = 'resubmit without the node (`exclude = "NODE"` in the cluster profile) and tell your site'

CAUSES = (
    Cause(
        "bad_node",
        "a node failed the check before the ranks",
        r"megabatch: preflight: not started on ",
        "a bad node, not the run: `megabatch resume` leaves it out for a day; if it is named with most others, it is "
        "the job's or the site's fault: see what was found",
    ),
    Cause(
        "hardware",
        "a GPU reported an uncorrectable memory error",
        r"uncorrectable ECC error|Xid \(.*\): (48|63|64|94|95)\b|double.bit ECC",
        f"the GPU is bad, not the run: {_EXCLUDE}; `nvidia-smi -q -d ECC,ROW_REMAPPER` on it shows more",
    ),
    Cause(
        "hardware",
        "a GPU or its links failed",
        r"fallen off the bus|GPU is lost|[Uu]ncorrectable NVLink error|Xid \(.*\): (74|79|119|120)\b"
        r"|[Hh]ardware stack error|CUDA error: unknown error",
        f"the node is bad, not the run: {_EXCLUDE}; `dmesg | grep -i xid` on it shows more",
    ),
    Cause(
        "oom_gpu",
        "out of GPU memory",
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|OutOfMemoryError: (?!CPU)"
        r"|Cuda failure( 2)? '?out of memory",
        "lower batch.micro_batch_size or data.max_length, turn on recompute.recompute_granularity=full, or split the "
        "model further (tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size); `megabatch "
        "plan` estimates the memory of each",
    ),
    Cause(
        "oom_shared",
        "a data worker died: out of shared memory, or killed",
        r"DataLoader worker \(pid\(?s?\)? .*(killed by signal|exited unexpectedly)|insufficient shared memory \(shm\)"
        r"|unable to (open|allocate|mmap) shared memory|Unexpected bus error encountered in worker",
        "lower data.dataloader_num_workers, ask for more in resources.mem_gib, or give containers a larger /dev/shm",
    ),
    Cause(
        "oom_host",
        "out of host memory",
        r"[Dd]etected \d+ oom.kill event|Out of memory: Killed process|oom-kill:|can't allocate memory: you tried to "
        r"allocate|Cannot allocate memory|^(\w+\.)*MemoryError\b|error: Exceeded job memory limit",
        "ask for more in resources.mem_gib (0 is all of a node), or lower data.dataloader_num_workers",
    ),
    Cause(
        "disk",
        "a disk is full, or gone",
        r"No space left on device|Disk quota exceeded|\[Errno (28|122|30|116|5)\]|Read-only file system"
        r"|Stale file handle|file write failed|PytorchStreamWriter failed",
        "make room (`df -h`, `lfs quota`), set checkpoint.save_total_limit, or move the run with --save or --run_dir; "
        "`megabatch resume` then goes on from the last whole checkpoint",
    ),
    Cause(
        "nan",
        "loss or gradients are no longer numbers",
        r"step \d+: loss=.*(nan|inf)|step \d+: .*gradient norm=(nan|-?inf)|found NaN in local grad norm"
        r"|Unexpected result (nan|inf)",
        "lower learning_rate.lr or warm up for longer, look at the data of that step; the last checkpoint is from "
        "before it",
    ),
    Cause(
        "environment",
        "a module, library or program is missing or does not fit",
        r"^(\w+\.)*(ModuleNotFoundError|ImportError): |error while loading shared libraries|cannot open shared object "
        r"file|version [`']\w+_[\d.]+' not found|CUDA driver version is insufficient|no kernel image is available"
        r"|: command not found|Unable to locate a modulefile|following module\(s\) are unknown"
        r"|execve\(\): .*(No such file|Permission denied)|No module named|[Ff]ailed to pull|couldn't start container",
        "run `megabatch doctor` on such a node; check the profile's `modules`, `setup` and `container`, and that the "
        "virtual environment lies where every node sees it",
    ),
    Cause(
        "data",
        "a dataset cannot be read as it is",
        r"\.(jsonl?|csv|parquet|arrow|txt|json\.gz|zst)\b.{0,40}\b(line|row|record) \d+|\.(jsonl?|csv|parquet|txt):\d+"
        r"|JSONDecodeError|ArrowInvalid|DatasetGenerationError|DataFilesNotFoundError|DatasetNotFoundError"
        r"|^error: data\.\w+|UnicodeDecodeError",
        "repair the line that the message names, or leave the sample out; the launcher checks datasets before it "
        "submits where it can read them",
    ),
    Cause(
        "config",
        "the configuration does not fit",
        r"\d+ faults?, nothing was submitted|^error: [a-z_]+\.[a-z0-9_]+( |=)|unrecognized arguments|does not fit the "
        r"checkpoint|size mismatch for|run\.json .*(newer|older|unreadable|not written)",
        "change what the message names and submit the recipe again, in a folder of its own",
    ),
    Cause(
        "cuda",
        "a GPU kernel failed",
        r"illegal memory access|device-side assert triggered|unspecified launch failure|misaligned address"
        r"|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|CUDNN_STATUS_\w*(FAILED|ERROR)|CUDA error: ",
        "run it again with CUDA_LAUNCH_BLOCKING=1 in the environment: the trace then ends at the kernel that fails; "
        "if it is always the same node, leave that out",
    ),
    Cause(
        "network",
        "the ranks cannot reach each other",
        r"[Nn]o socket interface found|NET/IB : .*(error|failed|No device)|ibv_\w+ (call )?failed"
        r"|Got completion .*with (status|error)|ncclSystemError|EADDRINUSE|Address already in use"
        r"|client socket has (timed out|failed)"
        r"|No route to host|Name or service not known|Temporary failure in name resolution|DistNetworkError"
        r"|connectFullMesh failed|Unable to find address for",
        "check `network` and NCCL_SOCKET_IFNAME / NCCL_IB_HCA in the cluster profile; NCCL_DEBUG=INFO names the "
        "interfaces that were tried",
    ),
    Cause(
        "hung",
        "the run hung",
        r"megabatch: the run hangs; rank \d+",
        "the stacks in that rank's log show where it stands; if it does not answer, suspect its node. A long first "
        "step or save wants a larger resources.hang_timeout_min",
    ),
    Cause(
        "time_limit",
        "the time limit came before everything was saved",
        r"CANCELLED AT .* DUE TO TIME LIMIT|have not saved in \d+ s",
        "raise resources.signal_delay_s above the time of a save, or resources.time; `megabatch resume` goes on from "
        "the last checkpoint",
    ),
    Cause(
        "node_failure",
        "a node failed",
        r"DUE TO NODE FAILURE|Node failure on|error: Node .* (failed|is not responding)|node.* not responding",
        "nothing of yours: Slurm requeues where it may, else `megabatch resume`; leave the node out if it fails again",
    ),
    Cause(
        "preemption",
        "preempted by another job",
        r"CANCELLED AT .* DUE TO PREEMPTION|DUE TO JOB REQUEUE",
        "nothing of yours: it goes on from its last checkpoint once it starts again, or with `megabatch resume`",
    ),
    Cause(
        "killed",
        "a crash in native code",
        r"Fatal Python error: (Segmentation fault|Aborted|Bus error|Illegal instruction|Floating)"
        r"|[Ss]egmentation fault",
        "the stack in that log names the library; check its version against torch's, then `megabatch resume`",
    ),
    Cause(
        "exception",
        "an exception that nobody foresaw",
        r"^(\w+\.)*\w+(Error|Exception|Interrupt|Exit): (?!.*(closed by peer|reset by peer|Socket closed"
        r"|remote process|NCCL|Timed out waiting|waitForInput|wait timeout|rank \d+ failed))"
        r"|^error: (?!rank \d+ failed|a rank that)",
        "the lines above it say where it happened",
    ),
    Cause(
        "timeout",
        "a rank waited in vain for another",
        r"[Ww]atchdog caught collective operation timeout|before timing out|Timed out waiting \d+ms for|ncclTimeout"
        r"|wait timeout after \d+ms|Some NCCL operations have failed or timed out",
        "another rank did not join: look at the one whose log ends first, or whose step is behind; raise "
        "training.distributed_timeout_minutes only if a step may really take longer",
        consequence=True,
    ),
    Cause(
        "communication",
        "a peer is gone",
        r"closed by peer|reset by peer|Broken pipe|Socket closed|ncclRemoteError|remote process exited|failed to recv"
        r"|recvValue failed|sendBytes failed|communicator was aborted|rank \d+ failed: |a rank that this one was"
        r"|Connection refused",
        "whoever went first has the cause in its log, or was killed without a word: `megabatch logs --rank batch`",
        consequence=True,
    ),
)

DEATHS = {
    "killed": Cause(
        "killed",
        "killed by a signal",
        "",
        "SIGKILL without a word is most often the kernel's memory killer (`dmesg`, resources.mem_gib), else a person",
    ),
    "hung": next(cause for cause in CAUSES if cause.name == "hung"),
    "time_limit": next(cause for cause in CAUSES if cause.name == "time_limit"),
    "node_failure": next(cause for cause in CAUSES if cause.name == "node_failure"),
    "preemption": next(cause for cause in CAUSES if cause.name == "preemption"),
    "oom_host": next(cause for cause in CAUSES if cause.name == "oom_host"),
    "cancelled": Cause(
        "cancelled", "cancelled", "", "`megabatch resume` goes on from the last checkpoint if that was a mistake"
    ),
    "dependency": Cause(
        "dependency",
        "a job that it waits for did not end well",
        "",
        "look at that job (`megabatch why` on its run), then submit or resume this one again",
    ),
    "lost": Cause(
        "lost",
        "Slurm does not know the job any more, and it left no word",
        "",
        "if its node died, `megabatch resume`; `sacct -j JOB` and the batch log may know more",
    ),
    "config": next(cause for cause in CAUSES if cause.name == "config"),
    "unknown": Cause("unknown", "no known cause", "", "read the lines below; `megabatch logs` shows all of them"),
}
"""What is known without a line in a log: from exit codes and Slurm's states."""
