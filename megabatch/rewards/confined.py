"""Runs a program with limits: `python -I confined.py FOLDER SECONDS MEMORY_MIB PROGRAM.py`, or `--probe FOLDER`.

The process gives up what it can before the program starts: writing outside FOLDER (Landlock), the network and other
processes (namespaces), and resources (rlimits). It imports the standard library alone, since it is run as a file.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWUSER, _NEWNET, _NEWPID = 0x10000000, 0x40000000, 0x20000000
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Numbers of Landlock's system calls, the same on every architecture (linux/include/uapi/asm-generic/unistd.h)."""
_WRITES = 1 << 1 | sum(1 << bit for bit in range(4, 13))
"""Landlock's rights to write, remove and make files of any kind (linux/landlock.h, ABI 1)."""
_TRUNCATE = 1 << 14
_FILE_MIB = 16
_FILES = 64
_PROCESSES = 64


def main() -> None:
    if sys.argv[1] == "--probe":
        print(isolate(), limit_writes(sys.argv[2]))
        return
    folder, seconds, memory_mib, program = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if isolate():
        _wait_for_child()
        resource.setrlimit(resource.RLIMIT_NPROC, (_PROCESSES, _PROCESSES))
    limit_writes(folder)
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mib * 2**20),
        (resource.RLIMIT_FSIZE, _FILE_MIB * 2**20),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", program])


def isolate() -> bool:
    """Namespaces of its own for users, network and processes: no address but itself can be reached. False where the
    system forbids it."""
    return _LIBC.unshare(_NEWUSER | _NEWNET | _NEWPID) == 0


def _wait_for_child() -> None:
    """Goes on in a child, the first process of the new namespace: when it ends, all that it started ends too."""
    child = os.fork()
    if not child:
        _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def limit_writes(folder: str) -> bool:
    """Only files in the folder, and /dev/null, can be written, made or removed. False where the kernel cannot."""
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    writes = _WRITES | (_TRUNCATE if version >= 3 else 0)
    handled = struct.pack("<Q", writes)
    ruleset = _LIBC.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
    for path, rights in ((folder, writes), ("/dev/null", writes & (1 << 1 | _TRUNCATE))):
        place = os.open(path, os.O_PATH)
        _LIBC.syscall(_ADD_RULE, ruleset, ctypes.c_int(1), struct.pack("<Qi", rights, place), ctypes.c_uint32(0))
        os.close(place)
    _LIBC.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return _LIBC.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0


if __name__ == "__main__":
    main()
