"""Accounting for a private cluster: a database and slurmdbd, so that sacct answers as on clusters that have it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from megabatch.slurm.cluster_config import ClusterLayout
from megabatch.slurm.processes import program_path, wait_for

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
"""Debian: slurmdbd and mariadb-server."""


def start_accounting(
    layout: ClusterLayout, *, spawn: Callable[[list[str], str], None], ask: Callable[..., str]
) -> None:
    """Starts database and slurmdbd, and returns once they know the cluster: jobs before that would be lost.

    Args: `spawn` starts a daemon of the cluster with its output in the log of that name in the cluster's folder; `ask`
    gives what a program of Slurm's prints. Raises: LaunchError.
    """
    log = layout.directory / "database.out"
    _make_folders(layout)
    _write_slurmdbd_conf(layout)
    make = _make_database_command(layout)
    with open(log, "ab") as output:
        subprocess.run([program_path(make[0]) or make[0], *make[1:]], stdout=output, stderr=output, check=False)
    spawn(_database_command(layout), log.name)
    wait_for(_socket(layout).exists, what="mariadbd", log=log)
    spawn(["slurmdbd", "-D"], "slurmdbd.out")
    wait_for(lambda: _knows_cluster(ask), what="slurmdbd", log=layout.directory / "slurmdbd.log", timeout_s=30)


def _knows_cluster(ask: Callable[..., str]) -> bool:
    ask("sacctmgr", "--immediate", "add", "cluster", "megabatch")
    return "megabatch" in ask("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster")


def _slurmdbd_conf(layout: ClusterLayout) -> str:
    settings: dict[str, str | int | Path] = {
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": layout.accounting_port,
        # only loopback listens
        "CommunicationParameters": "NoInAddrAny",
        "SlurmUser": _user(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket}",
        "LogFile": layout.directory / "slurmdbd.log",
        "PidFile": layout.directory / "slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        # slurmdbd connects through the socket that the environment names
        "StorageHost": "localhost",
        "StorageUser": _user(),
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def accounting_environment(layout: ClusterLayout) -> dict[str, str]:
    """What slurmdbd needs to find the database."""
    return {"MYSQL_UNIX_PORT": str(_socket(layout))}


def _make_database_command(layout: ClusterLayout) -> list[str]:
    """Fills the database's folder; run once, before `_database_command`."""
    return ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", "--skip-name-resolve",
            "--skip-test-db", f"--user={_user()}", f"--datadir={_folder(layout)}"]  # fmt: skip


def _database_command(layout: ClusterLayout) -> list[str]:
    """A database server without a password, on a socket that only this user can reach, and on no network."""
    return ["mariadbd", "--no-defaults", "--skip-networking", "--skip-grant-tables", f"--user={_user()}",
            f"--datadir={_folder(layout)}", f"--socket={_socket(layout)}", f"--pid-file={_folder(layout)}/pid",
            "--innodb-flush-log-at-trx-commit=0"]  # fmt: skip


def _make_folders(layout: ClusterLayout) -> None:
    """Closed to others: whoever reaches the socket owns the database. Never reuses an earlier cluster's database."""
    for folder in (_folder(layout), _socket(layout).parent):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)


def _write_slurmdbd_conf(layout: ClusterLayout) -> None:
    """slurmdbd refuses a file that others can read."""
    path = layout.directory / "slurmdbd.conf"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(_slurmdbd_conf(layout))


def _folder(layout: ClusterLayout) -> Path:
    return layout.directory / "database"


def _socket(layout: ClusterLayout) -> Path:
    return layout.socket_directory / "database" / "socket"


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
