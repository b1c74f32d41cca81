"""Free TCP ports on this machine, below the kernel's ephemeral range, so that no outgoing connection takes them."""

from __future__ import annotations

import random
import socket

from megabatch.errors import LaunchError

_PORTS = range(16000, 32000)


def free_port_block(count: int = 1) -> int:
    """The first of `count` consecutive free ports. Raises: LaunchError when there is no such block."""
    for start in random.sample(range(_PORTS.start, _PORTS.stop - count), k=200):
        if all(_is_free(start + offset) for offset in range(count)):
            return start
    raise LaunchError(f"no {count} consecutive free ports between {_PORTS.start} and {_PORTS.stop} on this machine")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
