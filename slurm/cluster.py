"""A private Slurm of N nodes on one machine, for trying things and for tests; works as an ordinary user or as root.

    python -m megabatch.slurm.cluster up --nodes 4 --dir DIR      # then: eval "$(… env --dir DIR)"
    python -m megabatch.slurm.cluster status --dir DIR
    python -m megabatch.slurm.cluster down --dir DIR

One slurmctld and one slurmd per node, all on the loopback address with ports of their own, so several clusters live
side by side. Credentials go through a munged of this cluster's own: nobody else can submit to it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path

from megabatch.errors import LaunchError, MegabatchError
from megabatch.run_directory import write_atomic
from megabatch.slurm import cluster_accounting
from megabatch.slurm.cluster_config import ClusterLayout, write_configuration
from megabatch.slurm.ports import free_port_block
from megabatch.slurm.processes import (
    Daemon,
    end_processes,
    last_lines,
    program_path,
    start_daemon,
    tagged_processes,
    wait_for,
)
from megabatch.slurm.quoting import shell
from megabatch.values import dataclass

_GUARD = """
cat # until the owner ends
left() { # daemons, and processes of jobs
    for entry in /proc/[0-9]*; do
        case "$entry" in "/proc/$$" | "/proc/$BASHPID") continue ;; esac
        if { grep -zqxF -- "$1" "$entry/environ" ||
            { grep -zqxF -- "$2" "$entry/environ" && grep -zq ^SLURM_JOB_ID= "$entry/environ"; }; } 2>/dev/null
        then echo "${entry#/proc/}"; fi
    done
}
for _ in {1..100}; do
    pids=$(left "$1" "$2")
    if [ -z "$pids" ]; then break; fi
    kill -KILL $pids 2>/dev/null
    sleep 0.1
done
rm -rf -- "$3"
"""
PROGRAMS = ("slurmctld", "slurmd", "munged", "scontrol", "sbatch", "srun")


def missing_programs(*, accounting: bool = False) -> list[str]:
    """Programs that a private cluster needs and this machine lacks."""
    wanted = PROGRAMS + (cluster_accounting.PROGRAMS if accounting else ())
    return [program for program in wanted if program_path(program) is None]


@dataclass(frozen=True, slots=True)
class PrivateCluster:
    """A running private cluster."""

    layout: ClusterLayout
    daemons: list[Daemon] = field(default_factory=list, repr=False)
    """Daemons that this process started; empty for a cluster that `up` left running."""

    @classmethod
    def start(
        cls,
        *,
        nodes: int = 2,
        directory: Path,
        gpus_per_node: int = 0,
        gpu_type: str | None = None,
        cpus_per_node: int = 16,
        accounting: bool = False,
        min_job_age_s: int = 300,
        keep: bool = False,
        timeout_s: float = 60,
    ) -> PrivateCluster:
        """Starts the daemons and returns once every node is idle (one to four seconds).

        Args: `directory` is created, and must not hold a running cluster; `accounting` adds what sacct needs (two
        seconds more); `min_job_age_s` is how long slurmctld remembers ended jobs; `keep` lets the cluster outlive
        this process, else it ends with it, however it ends.
        Raises: LaunchError with the daemons' last lines when it does not come up; nothing is left running then.
        """
        _check_can_start(directory, accounting=accounting)
        layout = ClusterLayout(
            directory=directory.absolute(),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpu_type=gpu_type,
            cpus_per_node=cpus_per_node,
            accounting=accounting,
            min_job_age_s=min_job_age_s,
            first_port=free_port_block(nodes + 1 + accounting),
            socket_directory=Path(tempfile.mkdtemp(prefix="megabatch-munge-")),
        )
        cluster = cls(layout)
        if not keep:
            atexit.register(cluster.stop)
        try:
            write_configuration(layout)
            write_atomic(layout.state_file, json.dumps(asdict(layout), default=str, indent=1))
            cluster._start_daemons(tied=not keep)
            cluster._wait_until_idle(deadline=time.monotonic() + timeout_s)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @classmethod
    def load(cls, directory: Path) -> PrivateCluster:
        """The cluster that `up` left in `directory`. Raises: LaunchError when there is none."""
        path = ClusterLayout.state_file_in(directory.absolute())
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LaunchError(
                f"no private cluster in {directory} ({error}); start one with `up --dir {directory}`"
            ) from error
        paths = {name: Path(values[name]) for name in ("directory", "socket_directory")}
        return cls(ClusterLayout(**(values | paths)))

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that a process needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.layout.configuration)}

    def stop(self) -> None:
        """Ends every job and daemon of this cluster; safe to call twice, and on a cluster that is half up."""
        tag = _tag(self.layout.directory)
        job = f"SLURM_CONF={self.layout.configuration}"
        end_processes(lambda: tagged_processes(tag) | tagged_processes(job, also="SLURM_JOB_ID="))
        for daemon in self.daemons:
            daemon.wait()
        shutil.rmtree(self.layout.socket_directory, ignore_errors=True)
        self.layout.state_file.unlink(missing_ok=True)
        atexit.unregister(self.stop)

    def node_states(self) -> dict[str, str]:
        """State of each node by name, as sinfo spells it (`idle`, `mixed`, `down*`, …)."""
        answer = self._ask("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T")
        return dict(line.split(maxsplit=1) for line in answer.splitlines())

    def _ask(self, program: str, *arguments: str) -> str:
        environment = os.environ | self.environment
        done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
        return done.stdout

    def _start_daemons(self, *, tied: bool) -> None:
        layout = self.layout
        if tied:
            self._start_guard()
        munged = ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in layout.munge_options().items())]
        self._spawn(munged, log="munged.out", tied=tied)
        wait_for(layout.munge_socket.exists, what="munged", log=layout.directory / "munged.out")
        if layout.accounting:
            cluster_accounting.start_accounting(
                layout, spawn=lambda command, log: self._spawn(command, log=log, tied=tied), ask=self._ask
            )
        self._spawn(["slurmctld", "-D"], log="slurmctld.out", tied=tied)
        for name in layout.node_names:
            self._spawn(["slurmd", "-D", "-N", name], log=f"slurmd.{name}.out", tied=tied)

    def _start_guard(self) -> None:
        """The kernel ends the daemons with this process, but not the jobs: a guard process ends those."""
        tag, layout = _tag(self.layout.directory), self.layout
        words = [tag, f"SLURM_CONF={layout.configuration}", str(layout.socket_directory)]
        with open(layout.directory / "guard.out", "ab") as log:
            guard = subprocess.Popen(
                ["bash", "-c", _GUARD, "guard", *words],
                env=os.environ | dict([tag.split("=", 1)]),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.daemons.append(guard)

    def _spawn(self, command: list[str], *, log: str, tied: bool) -> None:
        environment = _without_job(os.environ) | self.environment | dict([_tag(self.layout.directory).split("=", 1)])
        if self.layout.accounting:
            environment |= cluster_accounting.accounting_environment(self.layout)
        log_path = self.layout.directory / log
        self.daemons.append(start_daemon(command, environment, log=log_path, tied=tied))

    def _wait_until_idle(self, *, deadline: float) -> None:
        while not self._all_idle():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self.daemons):
                logs = "\n".join(last_lines(path) for path in sorted(self.layout.directory.glob("slurm*.out")))
                raise LaunchError(f"the private cluster in {self.layout.directory} did not start:\n{logs}")
            time.sleep(0.1)

    def _all_idle(self) -> bool:
        states = self.node_states()
        return len(states) == self.layout.nodes and set(states.values()) == {"idle"}


def _check_can_start(directory: Path, *, accounting: bool) -> None:
    missing = missing_programs(accounting=accounting)
    if missing:
        packages = "slurm-wlm munge" + " slurmdbd mariadb-server" * accounting
        raise LaunchError(f"a private cluster needs {', '.join(missing)}; on Debian: apt install {packages}")
    if tagged_processes(_tag(directory.absolute())):
        raise LaunchError(f"{directory} already holds a private cluster; stop it with `down --dir {directory}`")


def _tag(directory: Path) -> str:
    """A variable in every daemon's environment that names its cluster's folder: `down` finds leftovers by it."""
    return f"MEGABATCH_PRIVATE_CLUSTER={directory}"


def _without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without traces of a Slurm job that we may be running in."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return int(options.run(options) or 0)
    except MegabatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megabatch.slurm.cluster", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help_ in (
        ("up", _up, "start a cluster and leave it running"),
        ("down", _down, "stop its jobs and daemons"),
        ("env", _env, 'print the variables to export: eval "$(… env --dir DIR)"'),
        ("status", _status, "show its nodes"),
    ):
        command = commands.add_parser(name, help=help_)
        command.set_defaults(run=run)
        command.add_argument("--dir", type=Path, default=Path(".cluster"), help="its folder (default: %(default)s)")
        if name == "up":
            command.add_argument("--nodes", type=int, default=4)
            command.add_argument("--gpu_type", help="their type in Slurm, for example a100")
            command.add_argument("--gpus_per_node", type=int, default=0, help="simulated GPUs (plain files)")
            command.add_argument("--cpus_per_node", type=int, default=16, help="pretended CPUs")
            command.add_argument("--accounting", action="store_true", help="with accounting, so that sacct works")
    return parser.parse_args(arguments)


def _up(options: argparse.Namespace) -> None:
    cluster = PrivateCluster.start(
        nodes=options.nodes,
        directory=options.dir,
        gpus_per_node=options.gpus_per_node,
        gpu_type=options.gpu_type,
        cpus_per_node=options.cpus_per_node,
        accounting=options.accounting,
        keep=True,
    )
    command = f"python -m megabatch.slurm.cluster env --dir {shell(str(options.dir))}"
    print(f'# {options.nodes} nodes are idle; in your shell:  eval "$({command})"')
    _env_lines(cluster)


def _down(options: argparse.Namespace) -> None:
    PrivateCluster.load(options.dir).stop()


def _env(options: argparse.Namespace) -> None:
    _env_lines(PrivateCluster.load(options.dir))


def _env_lines(cluster: PrivateCluster) -> None:
    for name, value in cluster.environment.items():
        print(f"export {name}={shell(value)}")


def _status(options: argparse.Namespace) -> int:
    states = PrivateCluster.load(options.dir).node_states()
    for name, state in states.items():
        print(f"{name:8} {state}")
    return 0 if states else 1


if __name__ == "__main__":
    sys.exit(main())
