"""The run directory and the exit codes: all that launcher and trainer share besides `run.json`."""

from __future__ import annotations

import enum
import os
from pathlib import Path

from megabatch.values import dataclass


class ExitCode(enum.IntEnum):
    """Exit status of a trainer rank and of the batch script."""

    DONE = 0
    """Trained to the end."""
    FAILED = 1
    """A fault that the same command would hit again from the same checkpoint; the log has one clear message."""
    CONFIG = 2
    """A fault of the configuration, data or environment that the same command would hit again."""
    CRASHED = 70
    """An unexpected exception or a lost peer, with its message in the log; a retry may succeed
    (EX_SOFTWARE of sysexits.h)."""
    REQUEUE = 75
    """Stopped on request with everything saved: run again to continue (EX_TEMPFAIL of sysexits.h)."""
    HUNG = 124
    """No progress for `resources.hang_timeout_min`, so the launcher ended it (the code of timeout(1))."""

    @staticmethod
    def of_signal(code: int) -> bool:
        """Whether a signal (1 to 64) killed the process; ssh and containers return 255 for failures of their own."""
        return 128 < code <= 192

    @staticmethod
    def may_pass(code: int) -> bool:
        """Whether a retry may succeed: after crashes, hangs, and death by a signal (128 + its number)."""
        return code in (ExitCode.CRASHED, ExitCode.HUNG) or ExitCode.of_signal(code)


FIRST_NODE_SILENT = 111
"""Exit status of a node's preflight when the first node never answered."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths inside one run's directory; nothing here touches the disk."""

    path: Path

    @property
    def run_json(self) -> Path:
        """The resolved configuration, written once."""
        return self.path / "run.json"

    @property
    def script(self) -> Path:
        """The rendered sbatch script."""
        return self.path / "job.sbatch"

    @property
    def jobs(self) -> Path:
        """JSON lines: submissions (job id, time, cluster), how attempts start (job id, attempt, nodes) and end
        (…, exit code)."""
        return self.path / "jobs.jsonl"

    @property
    def launcher_lock(self) -> Path:
        """Exists while a launcher works in this folder; the launcher holds a lock on it."""
        return self.path / ".launcher.lock"

    @property
    def bad_nodes(self) -> Path:
        """JSON lines of the preflight: time, job_id, attempt, node, check, value, rule, excluded."""
        return self.path / "bad_nodes.jsonl"

    @property
    def logs(self) -> Path:
        """`batch.<job>.log` and `rank_<rank>.<attempt>.log`."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """Append-only JSON lines, one for each logged step; a line's `step` may repeat after a resume."""
        return self.path / "metrics.jsonl"

    @property
    def incidents(self) -> Path:
        """JSON lines, one per suspicious step (`watching.check_for_…`): step, loss, gradient norm, the action taken,
        and the sources of its samples."""
        return self.path / "incidents.jsonl"

    @property
    def ledger(self) -> Path:
        """Completions that the run trained on, `<number>.ledger` (megabatch/ledger)."""
        return self.path / "ledger"

    @property
    def profile(self) -> Path:
        """Traces of torch's profiler, `steps_<first>-<last>.rank_<rank>.<attempt>.json.gz`."""
        return self.path / "profile"

    @property
    def tracker(self) -> Path:
        """JSON of the process that sends metrics to a tracker: the tracker's id of this run, and how many bytes of
        metrics.jsonl it has sent."""
        return self.path / "tracker.json"

    @property
    def evaluation(self) -> Path:
        """JSON: what `megabatch evaluate` measured."""
        return self.path / "evaluation.json"

    @property
    def heartbeat(self) -> Path:
        """JSON, replaced atomically by rank 0: time, step, state, job id, attempt, versions."""
        return self.path / "heartbeat.json"

    @property
    def checkpoints(self) -> Path:
        """`step_%08d/` folders, complete ones only; `damaged.step_…` and `later.step_…` are folders set aside."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """Text file with the name of the checkpoint folder that the run resumes from: the last saved one, unless
        a user or a damaged checkpoint made the run go back."""
        return self.checkpoints / "latest"

    @property
    def best(self) -> Path:
        """Text file with the name of the checkpoint folder of the best evaluation, by `metric_for_best_model`."""
        return self.checkpoints / "best"

    @property
    def set_aside(self) -> Path:
        """JSON lines, one per renamed checkpoint: damaged, or from a history that the run abandoned."""
        return self.checkpoints / "set_aside.jsonl"

    def step(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps: `hf/` (safetensors) and `mcore/` (torch_dist)."""
        return self.checkpoints / f"step_{step:08d}"

    def rank_log(self, rank: int, attempt: int) -> Path:
        """`attempt` counts over the run: 0 is the first, whichever job it belongs to."""
        return self.logs / f"rank_{rank}.{attempt}.log"

    def batch_log(self, job_id: str) -> Path:
        """Output of a job's batch script, or of the local launcher (`local`), over all its attempts."""
        return self.logs / f"batch.{job_id}.log"

    def marker(self, name: str, job_id: str, attempt: int) -> Path:
        """`failed` (rank, exit code and node of the first rank that failed), `stop` (asked to stop) or `stopped`."""
        return self.logs / f"{name}.{job_id}.{attempt}"


def write_atomic(path: Path, text: str) -> None:
    """Replaces `path` with `text`, as `write_bytes_atomic` does."""
    write_bytes_atomic(path, text.encode(errors="surrogateescape"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replaces `path`: written under a temporary name in the same folder, synced, renamed.

    Only the owner may write the file, whatever the umask: jobs execute what such files contain.
    """
    temporary = path.with_name(f".{path.name[:200]}.{os.urandom(6).hex()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
