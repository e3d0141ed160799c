"""Runs a command as on another machine, which sees a folder by a mount of its own, and for a minute as it was.

    python client.py NAME SOURCE MOUNTPOINT COMMAND...

The mount is a passthrough of FUSE with time-outs of 60 s for names, for names that are not there, and for attributes,
in a mount namespace of its own; NAME is the machine's. So two clients of one folder see each other's files as those of
NFS may: late. Needs root, for the namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import mfusepy

SECONDS = 60
_NEW_MOUNTS, _NEW_NAME, _PRIVATE, _RECURSIVE, _DETACH = 0x20000, 0x4000000, 1 << 18, 1 << 14, 2
_ADOPT_ORPHANS = 36


class Passthrough(mfusepy.Operations):
    """All that a cache directory needs of a file system, from another folder.

    Args:
        source: That folder.
        ready: Descriptor that is closed once the file system answers.
    """

    use_ns = True

    def __init__(self, source: str, ready: int) -> None:
        self._source = source
        self._ready = ready

    def _path(self, path: str) -> str:
        return self._source + path

    def init(self, path: str) -> None:
        os.close(self._ready)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.lstat(self._path(path))
        names = ("mode", "ino", "nlink", "uid", "gid", "size")
        times = {f"st_{name}": getattr(status, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
        return {**{f"st_{name}": getattr(status, f"st_{name}") for name in names}, **times}

    def access(self, path: str, amode: int) -> int:
        return 0  # the kernel looks at the mode

    def readdir_with_offset(self, path: str, offset: int, fh: int) -> list[tuple[str, dict[str, int], int]]:
        # Names without a number are not listed.
        names = [".", "..", *os.listdir(self._path(path))]
        statuses = ((name, os.lstat(os.path.join(self._path(path), name))) for name in names)
        return [(name, {"st_ino": status.st_ino, "st_mode": status.st_mode}, 0) for name, status in statuses]

    def readlink(self, path: str) -> str:
        return os.readlink(self._path(path))

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._path(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._path(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._path(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._path(old), self._path(new))
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._path(source), self._path(target))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._path(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        os.chown(self._path(path), uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self._path(path), ns=times)
        return 0

    def open(self, path: str, flags: int) -> int:
        return os.open(self._path(path), flags & ~os.O_NOFOLLOW)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._path(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._source)
        names = ("bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "flag", "frsize", "namemax")
        return {f"f_{name}": getattr(found, f"f_{name}") for name in names}


def _check(answer: int) -> None:
    if answer != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@contextlib.contextmanager
def mounted(name: str, source: str, mountpoint: str) -> Iterator[None]:
    """Mount a folder at another one, for this process and those that it starts alone, on a machine of this name."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_MOUNTS | _NEW_NAME))
    socket.sethostname(name)
    _check(libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None))
    read, write = os.pipe()
    server = os.fork()
    if not server:
        os.close(read)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        timeouts = dict.fromkeys(("attr_timeout", "entry_timeout", "negative_timeout"), SECONDS)
        mfusepy.FUSE(
            Passthrough(source, write),
            mountpoint,
            foreground=True,
            nothreads=True,
            use_ino=True,
            hard_remove=True,
            default_permissions=True,
            allow_other=True,
            **timeouts,
        )
        os._exit(0)
    os.close(write)
    with open(read, "rb") as ready:
        ready.read()
    try:
        yield
    finally:
        libc.umount2(os.fsencode(mountpoint), _DETACH)
        os.waitpid(server, 0)


def run(command: list[str]) -> int:
    """Run a command, and wait for all that it leaves behind; returns its exit code."""
    _check(ctypes.CDLL(None, use_errno=True).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0))
    process, codes = os.spawnv(os.P_NOWAIT, command[0], command), {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[process]


def main(name: str, source: str, mountpoint: str, *command: str) -> int:
    with mounted(name, source, mountpoint):
        # In a process of its own, as this one has the file system's to wait for.
        runner = os.fork()
        if not runner:
            os._exit(run(list(command)) & 0xFF)
        return os.waitstatus_to_exitcode(os.waitpid(runner, 0)[1])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
