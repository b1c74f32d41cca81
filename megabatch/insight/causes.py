"""Why runs fail: classes of failure with their fixes, and the ordered table that maps evidence to a class.

The first row of `TABLE` that matches any evidence of an attempt gives the class: the row order is the precedence.
A row matches one line: of a log, or one that megabatch.insight.evidence derives from a first failure, an exit code or
Slurm's state. tests/insight/excerpts.txt holds what torch, NCCL, gloo, Slurm and others print for each row, and the
source of each text.
"""

from __future__ import annotations

import enum

from megabatch.slurm.script.stopping import NO_ANSWER
from megabatch.values import dataclass


class Source(enum.StrEnum):
    """Where evidence comes from."""

    SCRIPT = enum.auto()
    """The batch log of this attempt: output of the script, srun and slurmstepd."""
    FIRST = enum.auto()
    """The log of the rank that failed first."""
    RANK = enum.auto()
    """The log of any rank."""
    FIRST_FAILURE = enum.auto()
    """`exit code N` of the rank that failed first."""
    SLURM = enum.auto()
    """`STATE reason` of a job that did not start, or whose newest attempt recorded no ending."""
    ENDING = enum.auto()
    """`exit code N` of the job, or `no ending`."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One class of failure."""

    name: str
    """Programs may rely on it."""
    title: str
    fix: str


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of evidence."""

    cause: str
    sources: tuple[Source, ...]
    pattern: str
    """A Python regular expression, searched in one line."""


_CAUSES = (
    Cause(
        "bad_node",
        "a node failed the preflight",
        "the node is bad, not the run: `megabatch resume` excludes it for a day; if most nodes are named, the cause "
        "is the job or the site: see what the preflight found",
    ),
    Cause(
        "role",
        "a server beside the ranks failed",
        "its log has the reason; change the role's command, resources or `ready_s` in the recipe and submit it again, "
        "or use `megabatch resume` if the failure was an accident",
    ),
    Cause(
        "dependency",
        "a job that it depends on failed",
        "look at that job (`megabatch why` on its run), then submit or resume this one again",
    ),
    Cause(
        "hardware",
        "a GPU or its links failed",
        'the node is bad, not the run: resubmit without it (`exclude = "NODE"` in the cluster profile) and tell your '
        "site; on the node, `dmesg | grep -i xid` and `nvidia-smi -q -d ECC,ROW_REMAPPER` show more",
    ),
    Cause(
        "oom_gpu",
        "out of GPU memory",
        "lower batch.micro_batch_size or data.max_length, set recompute.recompute_granularity=full, or split the "
        "model further (tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size); `megabatch "
        "plan` estimates the memory of each",
    ),
    Cause(
        "oom_shared",
        "out of shared memory (/dev/shm)",
        "give containers a larger /dev/shm, remove what ended jobs left there on the node, or raise "
        "resources.mem_gib: files in it count as memory of the job",
    ),
    Cause(
        "oom_host",
        "out of host memory",
        "raise resources.mem_gib, or lower data.dataset_num_proc (processes that tokenise) and data.num_workers "
        "(threads, each with batches made ahead)",
    ),
    Cause(
        "limit",
        "a limit on open files, file sizes, processes, threads or locked memory was reached",
        "raise it with a line of the profile's `setup` (`ulimit -n` open files, `-f` file size, `-u` processes and "
        "threads, `-l` memory that InfiniBand locks; your site sets a cgroup's pids.max), or lower data.num_workers, "
        "data.dataset_num_proc and OMP_NUM_THREADS",
    ),
    Cause(
        "disk",
        "a disk is full or gone",
        "free some space (`df -h`, `lfs quota`), set checkpoint.save_total_limit, or move the run with --save or "
        "--run_dir; `megabatch resume` then continues from the last complete checkpoint",
    ),
    Cause(
        "nan",
        "loss or gradients are NaN or infinite",
        "lower learning_rate.lr, lengthen the warmup, or look at the data of that step; the last checkpoint is from "
        "before it",
    ),
    Cause(
        "spike",
        "loss or gradient norm is far above that of the steps before",
        "look at the data of that step, lower learning_rate.lr, or set watching.check_for_spiky_loss to skip; the "
        "last checkpoint is from before it",
    ),
    Cause(
        "damaged",
        "no checkpoint of the run is intact",
        "nothing was changed: restore an intact copy of the named file, or load an older checkpoint; `megabatch "
        "checkpoint verify RUN` checks all of them",
    ),
    Cause(
        "environment",
        "a module, library or program is missing or has the wrong version",
        "run `megabatch doctor` on such a node; check the profile's `modules`, `setup` and `container`, and that "
        "every node sees the virtual environment",
    ),
    Cause(
        "driver",
        "a node's GPUs or their driver cannot be used",
        "run `megabatch doctor` and `nvidia-smi` on that node: the driver must be new enough for torch's CUDA, see "
        "the job's GPUs (`gpu_request`; in containers `--nv` or enroot's hook), and no other process may hold them. "
        "Errors 802 and 803 are the node's (fabric manager, half-updated driver): exclude it and tell your site",
    ),
    Cause(
        "compile",
        "a kernel cannot be compiled",
        "the lines above it name the compiler and the kernel: nodes need a C compiler and Python's headers, versions "
        "of torch, triton and Transformer Engine that fit together and know this GPU (`megabatch doctor`); folders in "
        "TRITON_CACHE_DIR or TORCHINDUCTOR_CACHE_DIR that another version wrote may be removed",
    ),
    Cause(
        "download",
        "a model or a dataset cannot be downloaded",
        "check its name. Where nodes have no network, download it on a login node (`hf download NAME`, `hf download "
        "--repo-type dataset NAME`) into a cache that they share, or give the path of its files; a gated one needs "
        "HF_TOKEN in the environment, and so do many requests at once (429)",
    ),
    Cause(
        "data",
        "a dataset cannot be read",
        "repair the line that the message names, or remove the sample; the launcher checks the datasets that it can "
        "read before it submits",
    ),
    Cause(
        "config",
        "the configuration is invalid",
        "change what the message names and submit the recipe again, in a new folder",
    ),
    Cause(
        "cuda",
        "a GPU kernel failed",
        "run it again with CUDA_LAUNCH_BLOCKING=1 in the environment: the trace then ends at the failing kernel; if "
        "the node is always the same, exclude it",
    ),
    Cause(
        "network",
        "the ranks cannot reach each other",
        "check `network` and NCCL_SOCKET_IFNAME / NCCL_IB_HCA in the cluster profile; NCCL_DEBUG=INFO lists the "
        "interfaces that NCCL tried. A port in use belongs to another process on that node: `megabatch resume` takes "
        "another",
    ),
    Cause(
        "hung",
        "the run hung",
        "the stacks in that rank's log show where it is stuck; if it does not answer, suspect its node. If the first "
        "step or a save takes that long, raise resources.hang_timeout_min",
    ),
    Cause(
        "launch",
        "srun could not start the ranks",
        "its message names what it lacks: compare resources and the profile's `srun` with what the job's nodes have "
        "(`scontrol show node NODE`, `megabatch doctor --cluster NAME`); about MPI or PMIx: the ranks need none, so "
        'add "--mpi=none" to the profile\'s `srun`',
    ),
    Cause(
        "controller",
        "Slurm's controller did not answer the job",
        "not the run's fault: the job waited for it and is requeued if it may be, otherwise use `megabatch resume`; "
        "if it happens again, tell those who run the cluster",
    ),
    Cause(
        "time_limit",
        "the time limit came before everything was saved",
        "raise resources.signal_delay_s above the time that a save takes, or raise resources.time; `megabatch resume` "
        "continues from the last checkpoint",
    ),
    Cause(
        "node_failure",
        "a node failed",
        "not the run's fault: Slurm requeues it if it may, otherwise use `megabatch resume`; exclude the node if it "
        "fails again",
    ),
    Cause(
        "preemption",
        "preempted by another job, or requeued by an operator",
        "not the run's fault: it continues from its last checkpoint once it starts again, or with `megabatch resume`",
    ),
    Cause(
        "cancelled",
        "cancelled",
        "if that was a mistake, `megabatch resume` continues from the last checkpoint",
    ),
    Cause(
        "killed",
        "killed by a signal",
        "a SIGKILL without any message usually comes from the kernel's out-of-memory killer (`dmesg`, "
        "resources.mem_gib), otherwise from a person; after a crash in native code the stack in that log names the "
        "library: check its version against torch's",
    ),
    Cause(
        "error",
        "the run ended with an error message of its own",
        "do what the message says; then `megabatch resume`, or submit the recipe again if a parameter changes",
    ),
    Cause(
        "exception",
        "an unexpected exception",
        "the lines above it show where it happened",
    ),
    Cause(
        "timeout",
        "a rank timed out waiting for another",
        "another rank did not join: look at the one whose log ends first, or whose step is behind; raise "
        "parallel.distributed_timeout_minutes only if a step may really take longer",
    ),
    Cause(
        "communication",
        "another rank is gone",
        "the rank that ended first has the cause in its log, or was killed without a message: `megabatch logs --rank "
        "batch`",
    ),
    Cause(
        "lost",
        "Slurm no longer knows the job, and the job left no exit code",
        "if its node died, `megabatch resume`; `sacct -j JOB` and the batch log may know more",
    ),
    Cause("unknown", "no known cause", "read the lines below; `megabatch logs` shows all of them"),
)
CAUSES = {cause.name: cause for cause in _CAUSES}
"""Every class, by name."""
CONSEQUENCES = ("timeout", "communication")
"""Classes of ranks that failed because another rank failed."""


_SCRIPT, _FIRST_FAILURE, _SLURM, _ENDING = (Source.SCRIPT,), (Source.FIRST_FAILURE,), (Source.SLURM,), (Source.ENDING,)
_FIRST, _ANY = (Source.FIRST,), (Source.FIRST, Source.RANK)
_EXCEPTION = (
    r"^((\w+\.)*(\w+(Error|Exception|Interrupt|Exit)|Exception)|([a-z_]\w*\.)+[A-Z]\w+(?=: ))"
    r"(: (?!.*(closed by|reset by peer|Socket closed|remote process|NCCL .*(aborted|timed out)|NCCL operations"
    r"|setting up NCCL communicator|Timed out (waiting|after)|waitForInput|wait timeout|Socket Timeout"
    r"|detected a timeout|rank \d+ failed|monitoredBarrier|[Bb]roken pipe|failed to recv))|$)"
)
_ERROR = r"^error: (?!rank \d+ failed|a rank that)"
_NETWORK = (
    r"^(?!\[W\d).*([Nn]o socket interface found|NET/(IB|OFI) .*(error|failed|No device)|ibv_\w+ (call )?failed"
    r"|Got completion .*with (status|error)|ncclSystemError|unhandled system error|EADDRINUSE"
    r"|[Aa]ddress already in use|client socket has (timed out|failed)|No route to host|Network is unreachable"
    r"|Name or service not known"
    r"|Temporary failure in name resolution|DistNetworkError(?!: failed to recv)|connectFullMesh failed"
    r"|Unable to find address for|find a usable network interface|Error: network \S+ not found)"
)
_TIMEOUT = (
    r"[Ww]atchdog caught collective operation timeout|before timing out|Timed out waiting \d+ms for|ncclTimeout"
    r"|wait timeout after \d+ms|Some NCCL operations have failed or timed out|Timed out after \d+ seconds waiting"
    r"|failed to pass monitoredBarrier|Socket Timeout|detected a timeout of \d+ms|a collective timeout from rank"
    r"|Heartbeat monitor timed out|watchdog got stuck for|pmixp_coll\w+: .*timeout"
)
_COMMUNICATION = (
    r"closed by (remote )?peer|reset by peer|[Bb]roken pipe|Socket closed|ncclRemoteError|remote process exited"
    r"|failed to recv|recvValue failed|sendBytes failed|communicator was aborted|rank \d+ failed: "
    r"|a rank that this one was|Connection refused|\[Proxy Service.*Failed to execute operation"
)

_NAMED = (
    ("role", r"^error: ([a-z]+\.[a-z]+_model_server=.*|rollout server \S+) did not answer for "),
    (
        "hardware",
        r"uncorrectable ECC error|Xid \(.*\): (48|62|63|64|74|79|94|95|109|110|119|12[01]|140|143|15[4568]|160|17[12])"
        r"\b"
        r"|Xid \(.*\): 1(4[4-9]|50), .*\bFatal|double.bit ECC|fallen off the bus|GPU is lost|or a hardware error"
        r"|[Uu]ncorrectable (NVLink|memory) error|[Hh]ardware stack error|(CUDA error:"
        r"|Cuda failure( \d+)?) '?unknown error|Unable to determine the device handle for GPU",
    ),
    (
        "oom_gpu",
        r"CUDA out of memory|CUDA (driver )?error: out of memory|cuda runtime error \(2\) : out of memory"
        r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_\w*ALLOC\w*_FAILED|OutOfMemoryError: (?!CPU)"
        r"|Cuda failure( 2)? '?out of memory|Failed to CUDA (calloc|malloc)"
        r"|Free memory on device .* is less than desired GPU memory utilization"
        r"|No available memory for the cache blocks|larger than the available KV cache memory"
        r"|Triton Error \[CUDA\]: out of memory",
    ),
    (
        "oom_shared",
        r"insufficient shared memory \(shm\)|unable to (open|allocate|mmap) shared memory"
        r"|Error while creating shared memory segment|workers are out of shared memory"
        r"|unable to write to file </torch_|(/dev/shm/|misc/shmutils|include/shm).*No space left on device"
        r"|No space left on device.*/dev/shm/",
    ),
    (
        "oom_host",
        r"[Dd]etected \d+ oom.kill event|[Oo]ut of memory: Killed process|oom-kill:"
        r"|can't allocate memory: you tried to allocate|^(?!.*\bibv_).*Cannot allocate memory|^(\w+\.)*_?(Array"
        r"|Arrow)?MemoryError\b|std::bad_alloc"
        r"|error: .*(exceeded|Exceeded job) memory limit|tasks? [\d,-]+: Out Of Memory|a tokenising process died"
        r"|DataLoader worker \(pid \S+\) is killed by signal: Killed|subprocesses has abruptly died",
    ),
    (
        "limit",
        r"Too many open files|File too large|\[Errno (23|24|27)\]|can't start new thread"
        r"|pthread_create.*(failed|11|EAGAIN|unavailable)|Thread creation failed"
        r"|(fork|clone|thread|[Ss]pawn|posix_spawn|BlockingIOError|^RuntimeError: ).*Resource temporarily unavailable"
        r"|File size limit exceeded|fork: retry: No child processes|\bibv_\w+ .*Cannot allocate memory",
    ),
    (
        "disk",
        r"No space left on device|Disk quota exceeded|\[Errno (28|122|30|116|5|107|108|121)\]|Read-only file system"
        r"|\[Errno 110\][^:]*: '/|ransport endpoint (is not connected|shutdown)|database or disk is full"
        r"|Stale file handle|file write failed|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos"
        r"|^error: .*: no checkpoint can be read here, ",
    ),
    (
        "nan",
        r"step \d+: loss=-?(nan|inf)|step \d+: .*gradient norm=(nan|-?inf)|found (NaN|Inf) in local"
        r"|Unexpected result (nan|inf)|returned nan values in its|loss scale already at minimum"
        r"|probability tensor contains either `inf`, `nan`",
    ),
    ("spike", r"step \d+: loss=.* a spike of the "),
    ("damaged", r"^error: .*(: every checkpoint is damaged|step_\d+ is damaged: )"),
    (
        "driver",
        r"^(?!.*Warning: ).*(NVIDIA driver on your system|CUDA driver version is insufficient"
        r"|No CUDA GPUs are available|Unexpected error from cudaGetDeviceCount|system not yet initialized"
        r"|forward compatibility was attempted"
        r"|unsupported display driver|Driver/library version mismatch|couldn't communicate with the NVIDIA driver"
        r"|CUDA error: (invalid device ordinal|no CUDA-capable device|initialization error)"
        r"|device\(s\) is/are busy or unavailable|Failed to initialize NVML|nvidia-container-cli: |98-nvidia\.sh)",
    ),
    (
        "compile",
        r"^(\w+\.)*(InductorError|BackendCompilerFailed|CppCompileError|TritonMissing|PTXASError|CompilationError"
        r"|OutOfResources)\b|PassManager::run failed|ptxas fatal|Internal Triton PTX codegen error|Failed to find C "
        r"compiler|Python\.h: No such file|working triton installation|device kernel image is invalid|LLVM ERROR: "
        r"|PTX was compiled with an unsupported|Error (compiling objects|building extension)|Ninja is required to"
        r"|CUDA_HOME environment variable is not set|mismatches the version that was used to compile"
        r"|^torch\._dynamo\.exc\.",
    ),
    (
        "environment",
        r"^(\w+\.)*(ModuleNotFoundError|ImportError|PackageNotFoundError|DistributionNotFound|VersionConflict): "
        r"|error while loading shared libraries|cannot open shared object "
        r"file|version [`']\w+_[\d.]+' not found|no kernel image is available|symbol lookup error"
        r"|^(?!.*Warning: ).*undefined symbol|cuDNN (version incompatibility|Error: Version check failed)"
        r"|Torch not compiled with CUDA|init_fs_encoding"
        r"|: command not found|line \d+: .*: (No such file or directory|Permission denied|not found)$"
        r"|: exec: .*: (not found|cannot execute)|^\S*sh: \d+: .*: not found$|cannot execute binary file"
        r"|Unable to locate a modulefile|following module\(s\) are unknown|exist but cannot be loaded as requested"
        r"|Load of requirement \S+ failed|^CondaError: |Could not find conda environment|bin/env: .*: No such"
        r"|execve\(\): .*(No such file|Permission denied|Exec format)|No module named|[Ff]ailed to pull"
        r"|pyxis: .*(\[ERROR\]|failed|couldn't start|cannot create)|spank plugin stack|required plugin spank_"
        r"|launch failed: Plugin initialization failed|unrecognized option '--container|enroot-\w+: failed"
        r"|^(FATAL:  |ERROR  :) |unable to copy from source docker:|executable file not found in \$PATH"
        r"|GLIBC(XX)?_[\d.]+' not found|^error: .* package,? (which )?is not installed",
    ),
    (
        "download",
        r"^error: .*(cannot be downloaded \("
        r"|cannot be loaded \(\w*(Connect|Offline|DatasetNotFound|Gated|HTTP|Hub|EntryNotFound|Timeout|SSL|Proxy"
        r"|RepositoryNotFound|RevisionNotFound|NotExist))|^huggingface_hub\.|^(\w+\.)*DatasetNotFoundError"
        r"|^modelscope\.hub\.|^httpx\.\w+: |HTTPSConnectionPool\(host='[\w.-]*(huggingface|\bhf\.|modelscope)"
        r"|connect to 'https://huggingface\.co'|access a gated repo|is not a valid model identifier"
        r"|Couldn't reach '.*' on the Hub",
    ),
    (
        "data",
        r"\.(jsonl?|csv|parquet|arrow|txt|json\.gz|zst)\b.{0,40}\b(line|row|record) \d+|\.(jsonl?|csv|parquet|txt):\d+"
        r"|JSONDecodeError|Arrow(Invalid|NotImplementedError)|DatasetGeneration\w*Error|DataFilesNotFoundError"
        r"|^datasets\.exceptions\.|Config name is missing|BuilderConfig .* not found|Dataset scripts are no longer"
        r"|^_csv\.Error|^zlib\.error|BadGzipFile|Compressed file ended before the end-of-stream"
        r"|^error: data\.\w+|UnicodeDecodeError|no sample of the dataset is left|^error: dataset \S+ cannot be loaded"
        r"|^error: (?!\S*(metrics|jobs|bad_nodes|incidents|set_aside|completions)\.jsonl)\S+\.(jsonl|csv|tsv|parquet"
        r"|arrow)(\.\w+)?(:\d+)?: ",
    ),
    (
        "config",
        r"\d+ faults?, nothing was (started|submitted)|^error: [a-z_]+\.[a-z0-9_]+( |=)|unrecognized arguments"
        r"|does not fit the checkpoint|size mismatch for|run\.json .*(newer|older|unreadable|not written)",
    ),
    (
        "cuda",
        r"illegal memory access|device-side assert triggered|unspecified launch failure|misaligned address"
        r"|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|CUDNN_STATUS_\w*(FAILED|ERROR)|CUDA error: "
        r"|Triton Error \[CUDA\]|unhandled cuda error|ncclUnhandledCudaError|cu(BLAS|DNN) Error: "
        r"|thread: \[\d+,\d+,\d+\] Assertion|Xid \(.*\): (13|31)\b",
    ),
)
"""Faults that a log names directly, whichever process wrote it."""

TABLE = (
    # found by the job script before the ranks start, or beside them
    Row("bad_node", _SCRIPT, r"megabatch: preflight: not started on "),
    Row("role", _SCRIPT, r"^megabatch: role \w+, task \d+"),
    Row("dependency", _SCRIPT, r"^megabatch: input missing: "),
    Row("dependency", _SLURM, r"^pending Dependency|^(cancelled|lost) Dependency(NeverSatisfied| that cannot be met)"),
    # a fault named in the log of the rank that failed first, then one named by other ranks or Slurm's daemons
    *(Row(cause, _FIRST, pattern) for cause, pattern in _NAMED),
    *(Row(cause, (Source.RANK, Source.SCRIPT), pattern) for cause, pattern in _NAMED),
    Row("oom_host", _SLURM, r"^out_of_memory\b"),
    # ended from outside; later messages of the ranks are consequences
    Row("hung", _SCRIPT, r"^megabatch: the run hangs; rank \d+"),
    Row("hung", _FIRST_FAILURE, r"^exit code 124$"),
    Row("time_limit", _SCRIPT, r"CANCELLED AT .* DUE TO TIME LIMIT|have not saved in \d+ s"),
    Row("time_limit", _SLURM, r"^timeout\b"),
    Row(
        "node_failure",
        _SCRIPT,
        r"DUE TO NODE FAILURE|Node failure on|error: Node .* (failed|is not responding)|node.* not responding"
        r"|Task launch for \S+ failed on node .*: (Socket timed out|Communication|Unable to contact)"
        r"|slurm_receive_msgs: .*failed: Socket timed out",
    ),
    Row("node_failure", _SLURM, r"^node_fail\b"),
    Row("preemption", _SCRIPT, r"CANCELLED AT .* DUE TO (PREEMPTION|JOB REQUEUE)"),
    Row("preemption", _SLURM, r"^preempted\b"),
    Row("cancelled", _SCRIPT, r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*"),
    Row("cancelled", _SLURM, r"^cancelled\b"),
    Row("controller", _SCRIPT, rf"srun: error: Unable to \w+ (step|allocation) for job \d+: ({NO_ANSWER})"),
    Row(
        "launch",
        _SCRIPT,
        r"srun: error: (Unable to create step|Invalid MPI type|MPI: |Task launch for \S+ failed"
        r"|Application launch failed|task \S+ launch failed| *mpi/pmi)|^srun: fatal: |^srun: (unrecognized|invalid"
        r"|ambiguous) option|PMIX ERROR"
        r"|OMPI was not built with|It looks like (MPI_INIT|MPI runtime init|pmix_init) failed|OPAL ERROR",
    ),
    # how the rank that failed first ended; SIGABRT (134) is how NCCL's watchdog ends a rank after a timeout
    Row(
        "killed",
        _FIRST,
        r"Fatal Python error: (Segmentation fault|Bus error|Illegal instruction|Floating)"
        r"|Segfault encountered|Caught signal 11|double free or corruption|corrupted (double-linked|size vs)"
        r"|(malloc|free|munmap_chunk)\(\): (invalid|unaligned|corrupted)",
    ),
    Row("network", _FIRST, _NETWORK),
    Row("error", _FIRST, _ERROR),
    Row("exception", _FIRST, _EXCEPTION),
    Row("killed", _FIRST_FAILURE, r"^exit code (?!134)(129|1[3-8]\d|19[0-2])$"),
    # no rank is known as the first to fail, or its exit code is inconclusive
    Row("killed", (*_ANY, *_SCRIPT), r"(?<!failed: )[Ss]egmentation fault"),
    Row("network", (Source.RANK, *_SCRIPT), _NETWORK),
    Row("environment", _FIRST_FAILURE, r"^exit code 12[67]$"),
    Row("config", _FIRST_FAILURE, r"^exit code 2$"),
    Row("error", (Source.RANK,), _ERROR),
    Row("exception", (Source.RANK,), _EXCEPTION),
    Row("environment", _SCRIPT, r"^megabatch: the job script ended early"),
    Row("error", _SCRIPT, _ERROR),
    Row("exception", _SCRIPT, _EXCEPTION),
    # consequences of another rank's failure
    Row("timeout", (*_ANY, *_SCRIPT), _TIMEOUT),
    Row("communication", _FIRST, _COMMUNICATION),
    Row("killed", _FIRST_FAILURE, r"^exit code 134$"),
    Row("communication", (Source.RANK, *_SCRIPT), _COMMUNICATION),
    # nothing above matched: the bare exit code
    Row("config", _ENDING, r"^exit code 2$"),
    Row("hung", _ENDING, r"^exit code 124$"),
    Row("killed", _ENDING, r"^exit code (129|1[3-8]\d|19[0-2])$"),
    Row("environment", _ENDING, r"^exit code 12[67]$"),
    Row("unknown", _ENDING, r"^exit code"),
    Row("lost", _SLURM, r"^lost\b"),
    Row("lost", _ENDING, r"^no ending"),
)
"""Evidence and its class, strongest first."""
