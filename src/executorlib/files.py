"""Files that many processes, and maybe several users, share: put in place whole, and read only where they are trusted.

Reading what others wrote unpickles it or runs it. So only files of those are read whom the owner of the directory lets
write there, which is to be somebody to trust; and where that is everybody, only those of this user and of root. What
reads a file names the directory that was given by the user, the `root`, as all folders from there on count.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

# Nothing is loaded here that jobs do without: what a job loads, it pays for at every start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

# What may be done with what is made here, as far as the umask lets it: never written to by everybody.
FOLDER_MODE, FILE_MODE = 0o775, 0o664
# How long a folder's mode is taken for known, in seconds, and of how many.
_MODE_SECONDS, _MODES_KEPT = 2.0, 1000


class UntrustedFile(PermissionError):
    """A file is not read, or a folder not used, because anybody could have put it there."""


def write(path: str, data: bytes | memoryview) -> None:
    """Put a file in place, whole or not at all; its folder is made where missing."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb", opener=create) as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def create(path: str, flags: int) -> int:
    """Open a new file with the mode that all have, as an opener of `open`."""
    return os.open(path, flags, FILE_MODE)


def temporary_beside(path: str) -> str:
    """Name a file beside ``path``, whose folder is made where missing."""
    folder = os.path.dirname(path)
    os.makedirs(folder or ".", exist_ok=True)
    # Not `tempfile`: its files are the owner's alone, and an entry is for all who may use the directory.
    return os.path.join(folder, f".{os.getpid()}-{os.urandom(8).hex()}.tmp")


def is_older(path: str, seconds: float) -> bool:
    """Whether a file was last changed longer ago than that; one that is gone was not."""
    try:
        return time.time() - os.stat(path).st_mtime > seconds
    except OSError:
        return False


# The folders that were looked at: when, and the first folder on the way up to the cache directory that everybody may
# write to, if any.
_modes: dict[tuple[str, str | None], tuple[float, str | None]] = {}


def open_trusted(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> BinaryIO:
    """Open a file whose writer is to be trusted, for reading.

    Args:
        path: The file.
        root: The cache directory that it is in; by default its folder.

    Raises:
        UntrustedFile: Anybody could have put it there.
        OSError: It cannot be opened.
    """
    file = open(path, "rb", opener=open_file)  # noqa: SIM115  # it is the caller's
    try:
        folder = _open_to_all(os.path.dirname(path), None if root is None else os.fspath(root))
        if folder is not None and not is_trusted(owner := os.fstat(file.fileno()).st_uid):
            raise UntrustedFile(
                f"{os.fspath(path)} is not read: it is {name_of(owner)}'s, and everybody may write to {folder}, so "
                f"anybody could have put it there, with anything in it. Remove it. {advice_for(folder)}"
            )
    except BaseException:
        file.close()
        raise
    return file


def open_file(path: str, flags: int) -> int:
    """As an opener of `open`, for what may be no file."""
    # A pipe in the place of a file would keep who reads it for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _open_to_all(folder: str, root: str | None) -> str | None:
    """The folder that everybody may write to, from this one up to the cache directory; None where there is none."""
    now = time.monotonic()
    known = _modes.get((folder, root))
    if known is not None and now - known[0] < _MODE_SECONDS:
        return known[1]
    found = next((each for each in _way_up(folder, root) if os.stat(each).st_mode & stat.S_IWOTH), None)
    if len(_modes) >= _MODES_KEPT:
        _modes.clear()
    _modes[folder, root] = now, found
    return found


def _way_up(folder: str, root: str | None) -> Iterator[str]:
    each = os.path.abspath(folder)
    if root is None:
        yield each
        return
    tops = {os.path.abspath(root), os.path.realpath(root)}
    # By the cache directory's other name it is another one, of which no folder between the two is known.
    on_the_way = any(each == top or each.startswith(top.rstrip(os.sep) + os.sep) for top in tops)
    yield each
    while on_the_way and each not in tops:
        each = os.path.dirname(each)
        yield each
    yield from tops


def is_trusted(owner: int) -> bool:
    """Whether what this user made is read where everybody may write."""
    return owner in (0, os.geteuid())


def name_of(owner: int) -> str:
    """A user's name."""
    import pwd  # only for errors

    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"


def advice_for(folder: str) -> str:
    """What to do about a folder that everybody may write to, for the end of an error text."""
    return f"Then take the right to write from others (chmod o-w {folder}), or use another cache_directory."
