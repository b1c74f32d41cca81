"""Configuration files of a private cluster: everything Slurm must be told to run N nodes on one machine."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
from pathlib import Path

from megabatch.errors import LaunchError
from megabatch.run_directory import write_atomic
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterLayout:
    """Where a private cluster lives and how big it is."""

    directory: Path
    nodes: int
    gpus_per_node: int
    gpu_type: str | None
    cpus_per_node: int
    first_port: int
    """slurmctld's; node k has `first_port + k`, slurmdbd the one after the last node's."""
    socket_directory: Path
    """A short path: a Unix socket's name may have 107 bytes."""
    accounting: bool = False
    """With a database and slurmdbd, so that sacct answers."""
    min_job_age_s: int = 300
    """How long slurmctld remembers a job that has ended."""

    @staticmethod
    def state_file_in(directory: Path) -> Path:
        return directory / "cluster.json"

    @property
    def state_file(self) -> Path:
        """Exists while the cluster is up."""
        return self.state_file_in(self.directory)

    @property
    def configuration(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.socket_directory / "socket"

    @property
    def node_names(self) -> list[str]:
        return [f"n{k}" for k in range(1, self.nodes + 1)]

    @property
    def ports(self) -> int:
        return self.nodes + 1 + self.accounting

    @property
    def accounting_port(self) -> int:
        return self.first_port + self.nodes + 1

    def munge_options(self) -> dict[str, str | Path]:
        """Long options of munged."""
        files = {f"{name}-file": self.directory / f"munge.{name}" for name in ("key", "log", "pid", "seed")}
        return {"socket": self.munge_socket, **files}


def write_configuration(layout: ClusterLayout) -> None:
    """Writes slurm.conf, gres.conf, the munge key and the folders; an earlier cluster's state is not reused."""
    layout.directory.mkdir(parents=True, exist_ok=True)
    layout.socket_directory.chmod(0o711)
    for name in ("state", "spool"):
        _empty_folder(layout.directory / name)
    for name in layout.node_names:
        (layout.directory / "spool" / name).mkdir()
    key = layout.directory / "munge.key"
    key.unlink(missing_ok=True)
    descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(128))
    for gpu in range(layout.gpus_per_node):
        device = layout.directory / f"gpu{gpu}"
        device.unlink(missing_ok=True)
        # Slurm needs a device file for each GPU
        device.symlink_to("/dev/null")
    write_atomic(layout.configuration, slurm_conf(layout))
    write_atomic(layout.directory / "gres.conf", _gres_conf(layout))


def _empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


_SETTINGS: dict[str, str | int] = {
    "ClusterName": "megabatch",
    # only loopback listens
    "CommunicationParameters": "NoAddrCache,NoCtldInAddrAny,NoInAddrAny",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    # nodes have the size that we declare, whatever the machine has
    "SlurmdParameters": "config_overrides",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CPU",
    # refuse a job that can never run instead of queueing it
    "EnforcePartLimits": "ALL",
    "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "MpiDefault": "none",
    "ReturnToService": 2,
    # the time that ranks have to save when their job is cancelled or preempted, on a machine that has much else to do
    "KillWait": 30,
    "InactiveLimit": 0,
    "SlurmctldTimeout": 60,
    "SlurmdTimeout": 30,
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "JobRequeue": 1,
    "JobCompType": "jobcomp/filetxt",
    "MailProg": "/bin/true",
}
"""Settings that all private clusters share."""


def slurm_conf(layout: ClusterLayout) -> str:
    """Text of slurm.conf. Raises: LaunchError for a folder name that slurm.conf cannot hold."""
    directory = str(layout.directory)
    if not directory.isprintable() or set(directory) & set(" \"'#%\\,=[]"):
        raise LaunchError(f"{directory}: Slurm's configuration cannot hold this folder's name; choose a plain one")
    host = socket.gethostname().split(".")[0]
    settings = _SETTINGS | _of_this_machine(layout, host=host) | _accounting(layout)
    nodes = ",".join(layout.node_names)
    lines = [
        *(f"{name}={value}" for name, value in settings.items()),
        *(_node_line(layout, index, host=host) for index in range(1, layout.nodes + 1)),
        f"PartitionName=batch Nodes={nodes} Default=YES PriorityTier=1 MaxTime=INFINITE State=UP",
        f"PartitionName=urgent Nodes={nodes} PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def _of_this_machine(layout: ClusterLayout, *, host: str) -> dict[str, str | int]:
    """Names, ports, folders and sizes."""
    user, folder = pwd.getpwuid(os.geteuid()).pw_name, layout.directory
    return {
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": layout.first_port,
        "SlurmUser": user,
        "SlurmdUser": user,
        # a requeued job waits until its old credential has expired: two minutes by default
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/slurmd.%n.log",
        "JobCompLoc": f"{folder}/jobcomp.log",
        "MinJobAge": layout.min_job_age_s,
        **({"GresTypes": "gpu"} if layout.gpus_per_node else {}),
    }


def _accounting(layout: ClusterLayout) -> dict[str, str | int]:
    if not layout.accounting:
        return {"AccountingStorageType": "accounting_storage/none"}
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": layout.accounting_port,
        # munge's socket, whatever the name says
        "AccountingStoragePass": str(layout.munge_socket),
    }


def _node_line(layout: ClusterLayout, index: int, *, host: str) -> str:
    kind = f"{layout.gpu_type}:" if layout.gpu_type else ""
    gres = f" Gres=gpu:{kind}{layout.gpus_per_node}" if layout.gpus_per_node else ""
    return (
        f"NodeName=n{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={layout.first_port + index} "
        f"CPUs={layout.cpus_per_node} RealMemory=1000000{gres} State=UNKNOWN"
    )


def _gres_conf(layout: ClusterLayout) -> str:
    if not layout.gpus_per_node:
        return ""
    nodes, last = ",".join(layout.node_names), layout.gpus_per_node - 1
    kind = f" Type={layout.gpu_type}" if layout.gpu_type else ""
    return f"NodeName={nodes} Name=gpu{kind} File={layout.directory}/gpu[0-{last}]\n"
