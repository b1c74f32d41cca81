"""Accounting for a private cluster: a database and slurmdbd, so that sacct answers as on clusters that have it."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from megabatch.slurm.cluster_config import ClusterLayout

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
"""Debian: slurmdbd and mariadb-server."""


def slurmdbd_conf(layout: ClusterLayout) -> str:
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
        # slurmdbd reaches it by the socket that the environment names
        "StorageHost": "localhost",
        "StorageUser": _user(),
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def accounting_environment(layout: ClusterLayout) -> dict[str, str]:
    """What slurmdbd needs to find the database."""
    return {"MYSQL_UNIX_PORT": str(_socket(layout))}


def make_database_command(layout: ClusterLayout) -> list[str]:
    """Fills the database's folder; run once, before `database_command`."""
    return ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", "--skip-name-resolve",
            "--skip-test-db", f"--user={_user()}", f"--datadir={_folder(layout)}"]  # fmt: skip


def database_command(layout: ClusterLayout) -> list[str]:
    """A database server without a password, on a socket that this user alone can reach and on no network."""
    return ["mariadbd", "--no-defaults", "--skip-networking", "--skip-grant-tables", f"--user={_user()}",
            f"--datadir={_folder(layout)}", f"--socket={_socket(layout)}", f"--pid-file={_folder(layout)}/pid",
            "--innodb-flush-log-at-trx-commit=0"]  # fmt: skip


def database_is_up(layout: ClusterLayout) -> bool:
    return _socket(layout).exists()


def make_folders(layout: ClusterLayout) -> None:
    """Closed to others: whoever reaches the socket owns the database. An earlier cluster's is not used."""
    for folder in (_folder(layout), _socket(layout).parent):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)


def write_slurmdbd_conf(layout: ClusterLayout) -> None:
    """slurmdbd refuses a file that others may read."""
    path = layout.directory / "slurmdbd.conf"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(slurmdbd_conf(layout))


def _folder(layout: ClusterLayout) -> Path:
    return layout.directory / "database"


def _socket(layout: ClusterLayout) -> Path:
    return layout.socket_directory / "database" / "socket"


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
