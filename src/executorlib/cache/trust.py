"""Files that several processes, and maybe users, share: put in place whole, and read only if they are trusted.

Whatever others wrote is unpickled or run when it is read. So a file is read only if its writer is trusted. In a
directory of this user, of root, or shared with a group of this user, that is anybody whom its owner lets write there.
If everybody may write there, only this user and root are trusted. Anything below a cache directory is reached from it
step by step, by descriptors and without following links, so what was checked is what is read, written or removed. The
directory itself, the `root`, is the user's choice, so links to it are followed as usual.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time

# Every job pays for these imports at its start, so only what all jobs need is loaded here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    _T = TypeVar("_T")

# Permissions of what is made here, before the umask. Never writable by everybody.
FOLDER_MODE, FILE_MODE = 0o775, 0o664
# Permissions of files that hold the user's environment.
PRIVATE_MODE = 0o600

# For passing through a folder: on Linux this needs no right to list it and does not bother a network file system.
_STEP = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
LIST = os.O_DIRECTORY | os.O_CLOEXEC | os.O_RDONLY | os.O_NOFOLLOW
# Opened without blocking, because a pipe in the place of a file would block its reader forever.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# How often to make a folder again if another process finds it empty and removes it at the same moment.
_TRIES = 20


class UntrustedFile(PermissionError):
    """A file is not read, or a folder not used, because a stranger could have put it there."""


# -- folders ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(folder: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Iterator[int]:
    """Open a folder of a cache directory after making sure that it can be trusted.

    Args:
        folder: The folder.
        root: The cache directory that it is in; by default the folder itself.

    Returns:
        A descriptor through which to reach what is in the folder.

    Raises:
        UntrustedFile: The folder, or one above it, is a link or a stranger's.
        OSError: The folder cannot be opened.
    """
    fd, _ = _open_folder(os.fspath(folder), root)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_folder(folder: str, root: str | os.PathLike[str] | None) -> tuple[int, str | None]:
    """Open a folder as `opened` does. Also return the topmost folder on the way that everybody may write to, if any."""
    top, steps = _way_down(folder, root)
    fd = os.open(top, _STEP)
    try:
        exposed = top if _checked_top(top, fd).st_mode & stat.S_IWOTH else None
        for step in steps:
            above, top = top, os.path.join(top, step)
            below = _open_step(fd, step, top)
            os.close(fd)
            fd = below
            status = os.fstat(fd)
            if exposed is not None and not is_trusted(status.st_uid):
                raise UntrustedFile(
                    f"{top} is not used: it belongs to {name_of(status.st_uid)}, and everybody may write to {above}, "
                    f"so anybody could have created it with any content. Remove it. {advice_for(exposed)}"
                )
            if exposed is None and status.st_mode & stat.S_IWOTH:
                exposed = top
    except BaseException:
        os.close(fd)
        raise
    return fd, exposed


def _way_down(folder: str, root: str | os.PathLike[str] | None) -> tuple[str, list[str]]:
    """Return where to start, and the names of the folders from there down to this one."""
    folder = os.path.abspath(folder)
    if root is not None and folder != root:
        # The directory may be known by several names; the path from it to the folder is the same under each.
        for name in (os.path.abspath, os.path.realpath):
            top = name(os.fspath(root))
            if folder == top:
                return top, []
            if folder.startswith(top.rstrip(os.sep) + os.sep):
                return top, folder[len(top) :].strip(os.sep).split(os.sep)
    return folder, []


def _open_step(fd: int, name: str, path: str) -> int:
    try:
        return os.open(name, _STEP | os.O_NOFOLLOW, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and _is_link(fd, name):
            raise UntrustedFile(_link_text(path)) from None
        raise


def _is_link(fd: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _link_text(path: str) -> str:
    return (
        f"{path} is not used: it is a symbolic link, and links inside a cache directory are not followed, because they "
        "can lead to another call's result or to any other file. Replace it by the file or folder it points to, or "
        "remove it."
    )


def _checked_top(top: str, fd: int) -> os.stat_result:
    """Make sure that a cache directory is not a stranger's.

    Raises:
        UntrustedFile: It is a stranger's.
    """
    status = os.fstat(fd)
    if not (is_trusted(status.st_uid) or _is_shared(top, status) or _is_own_under_another_name(fd, status)):
        owner = name_of(status.st_uid)
        raise UntrustedFile(
            f"{top} is not used as a cache directory: it belongs to {owner}, who can put anything into it, and reading "
            f"an entry runs code that it contains. Use a directory of your own. If you trust {owner}, copy what you "
            f"need (cp -r), or have {owner} share it with a group that you are in (chgrp GROUP {top}; chmod g+ws "
            f"{top}). As root, run this as the user who owns the directory."
        )
    return status


def _is_shared(top: str, status: os.stat_result) -> bool:
    """Return whether the owner shares a directory with this user on purpose, through a group that may write there."""
    if not status.st_mode & stat.S_IWGRP or status.st_gid not in (os.getegid(), *os.getgroups()):
        return False
    # In a container, all groups unknown to it look the same. Only the kernel knows which of them this user is in.
    return os.access(top, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


# By device: the owner of the files that this process makes there, if the file system changes the owner.
_own_names: dict[int, int] = {}


def _is_own_under_another_name(fd: int, status: os.stat_result) -> bool:
    """Return whether a folder's owner is this user under the name that the file system uses.

    Servers of network file systems map users to others: root to nobody (``root_squash``), or everybody to one user. The
    owner of a new file shows the mapping.
    """
    if _own_names.get(status.st_dev) == status.st_uid:
        return True
    name = _temporary()
    try:
        made = os.open(name, _CREATE, PRIVATE_MODE, dir_fd=fd)
    except OSError:
        return False
    try:
        owner = os.fstat(made).st_uid
    finally:
        os.close(made)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=fd)
    if owner != os.geteuid():
        _own_names[status.st_dev] = owner
    return owner == status.st_uid


def is_own(status: os.stat_result) -> bool:
    """Return whether this user may remove a file with this status: it is this user's, or this user is root."""
    return os.geteuid() in (0, status.st_uid) or _own_names.get(status.st_dev) == status.st_uid


def check_folder(folder: str) -> None:
    """Make sure that a directory can be used as a cache directory. It may be missing if it can be made.

    Raises:
        UntrustedFile: It is a stranger's.
        OSError: It is not a directory, or cannot be made.
    """
    try:
        with opened(folder):
            return
    except FileNotFoundError:
        pass
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), above)
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), above)


def make_folder(folder: str, root: str | os.PathLike[str] | None = None) -> None:
    """Make a folder of a cache directory, and those above it, if they are missing.

    Args:
        folder: The folder.
        root: The cache directory; by default the folder itself.

    Raises:
        UntrustedFile: One of the folders is a link or a stranger's.
        OSError: A folder cannot be made.
    """
    top, steps = _way_down(folder, root)
    os.makedirs(top, FOLDER_MODE, exist_ok=True)
    for step in steps:
        with opened(top, root) as above, contextlib.suppress(FileExistsError):
            os.mkdir(step, FOLDER_MODE, dir_fd=above)
        top = os.path.join(top, step)


def within(
    folder: str,
    root: str | os.PathLike[str] | None,
    step: Callable[[int], _T],
) -> _T:
    """Do something in a folder. It is made if it is missing, and made again if another process removes it meanwhile.

    Args:
        folder: The folder.
        root: The cache directory that it is in; by default the folder itself.
        step: The action. It gets a descriptor of the folder.
    """
    for _ in range(_TRIES):
        try:
            with opened(folder, root) as found:
                return step(found)
        except FileNotFoundError:
            make_folder(folder, root)
    with opened(folder, root) as found:
        return step(found)


def listed(folder: str, root: str | os.PathLike[str] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the name and the status of everything in a folder, without following links.

    Args:
        folder: The folder.
        root: The cache directory that it is in; by default the folder itself.

    Raises:
        UntrustedFile: The folder, or one above it, is a link or a stranger's.
        OSError: The folder cannot be listed.
    """
    with opened(folder, root) as above:
        fd = os.open(".", LIST, dir_fd=above)
        try:
            for name in os.listdir(fd):
                with contextlib.suppress(FileNotFoundError):
                    yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)
        finally:
            os.close(fd)


# -- writing ------------------------------------------------------------------------------------------------------


def write(
    path: str,
    data: bytes | memoryview,
    root: str | os.PathLike[str] | None = None,
    *,
    durable: bool = False,
    mode: int = FILE_MODE,
) -> None:
    """Write a file, whole or not at all. Its folder is made if it is missing.

    Args:
        path: The file.
        data: Its content.
        root: The cache directory that it is in; by default its folder.
        durable: Also make sure that the file is whole after a loss of power.
        mode: Its permissions, before the umask.
    """
    name = os.path.basename(path)

    def put(folder: int) -> None:
        temporary = _written(folder, data, durable, mode)
        try:
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _discard(folder, temporary)
            raise

    within(os.path.dirname(path) or ".", root, put)


def write_first(path: str, data: bytes | memoryview, root: str | os.PathLike[str] | None = None) -> bool:
    """Write a file whole unless it exists already, and return whether it was written.

    Args:
        path: The file.
        data: Its content.
        root: The cache directory that it is in; by default its folder.
    """
    name = os.path.basename(path)

    def put(folder: int) -> bool:
        temporary = _written(folder, data, False, FILE_MODE)
        try:
            return _named_first(folder, temporary, name)
        finally:
            _discard(folder, temporary)

    return within(os.path.dirname(path) or ".", root, put)


def make_mark(path: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Make an empty file unless it exists already, and return whether it was made."""

    def make(folder: int) -> bool:
        try:
            os.close(os.open(os.path.basename(path), _CREATE, FILE_MODE, dir_fd=folder))
        except FileExistsError:
            return False
        return True

    return within(os.path.dirname(path) or ".", root, make)


def _named_first(folder: int, temporary: str, name: str) -> bool:
    """Give a file its name unless that name is taken, and return whether the file has it."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        # A server may have made the link, lost its answer and been asked again.
        return os.stat(temporary, dir_fd=folder, follow_symlinks=False).st_nlink > 1
    except FileNotFoundError:
        raise  # the folder is gone, and `within` makes it again
    except OSError:
        # There are no hard links here. An empty file is a claim as well; its readers know that it may be filled soon.
        try:
            os.close(os.open(name, _CREATE, FILE_MODE, dir_fd=folder))
        except FileExistsError:
            return False
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    return True


def _written(folder: int, data: bytes | memoryview, durable: bool, mode: int) -> str:
    """Write a file under a temporary name, and return that name."""
    name = _temporary()
    try:
        with open(os.open(name, _CREATE, mode, dir_fd=folder), "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if durable:
                # Its name need not be durable: if a result is lost as a whole, its call runs again.
                (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(file.fileno())
    except BaseException:
        _discard(folder, name)
        raise
    return name


def _discard(folder: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _temporary() -> str:
    # Not `tempfile`, whose files only their owner may read: an entry is for all who may use the directory.
    return f".{os.getpid()}-{os.urandom(8).hex()}.tmp"


def remove(path: str, root: str | os.PathLike[str] | None = None) -> None:
    """Remove a file if it exists. If it is a link, the link itself is removed.

    Args:
        path: The file.
        root: The cache directory that it is in; by default its folder.
    """
    with (
        contextlib.suppress(FileNotFoundError),
        opened(os.path.dirname(path) or ".", root) as folder,
    ):
        os.unlink(os.path.basename(path), dir_fd=folder)


# -- reading ------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, last: int | None = None) -> bytes:
    """Read a file if its writer is trusted.

    Args:
        path: The file.
        root: The cache directory that it is in; by default its folder.
        last: Read at most this many bytes from the end; None for all.

    Raises:
        UntrustedFile: The file is a link, or a stranger could have put it there.
        OSError: It cannot be opened, or is not a regular file.
    """
    path = os.fspath(path)
    above, name = os.path.split(path)
    folder, exposed = _open_folder(above, root)
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except OSError as error:
        if _is_link(folder, name):
            raise UntrustedFile(_link_text(path)) from None
        error.filename = path
        raise
    finally:
        os.close(folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        if exposed is not None and not is_trusted(status.st_uid):
            raise UntrustedFile(
                f"{path} is not read: it belongs to {name_of(status.st_uid)}, and everybody may write to {exposed}, so "
                f"anybody could have put it there with any content. Remove it. {advice_for(exposed)}"
            )
        # Read no more than the file has now, because one that keeps growing has no end.
        size = status.st_size
        if last is not None and size > last:
            os.lseek(fd, size - last, os.SEEK_SET)
            size = last
        data = os.read(fd, size)
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
        return data
    finally:
        os.close(fd)


def is_there(path: str) -> bool:
    """Return whether a file or a folder exists, regardless of what a network file system remembers.

    Such file systems remember for a while which names exist and which do not, NFS by default for up to a minute. NFS
    asks its server again about the names in a folder when the folder is opened. FUSE file systems ask when a name is
    about to be made and must not exist yet. So this tries to make a hard link to a folder, which can never be made. Its
    source is the opened folder, by descriptor: the path could be a symbolic link, which can have a second name.
    """
    folder, name = os.path.split(path)
    try:
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return bool(folder) and is_there(folder) and os.path.lexists(path)
    except OSError:
        return os.path.lexists(path)
    try:
        if sys.platform == "linux":
            os.link(".", name, src_dir_fd=fd, dst_dir_fd=fd)
    except FileExistsError:
        return True
    except OSError:
        pass
    finally:
        os.close(fd)
    return os.path.lexists(path)


def is_older(path: str, seconds: float) -> bool:
    """Return whether a file was last changed longer ago than that; False if it is gone."""
    try:
        return time.time() - os.stat(path).st_mtime > seconds
    except OSError:
        return False


def is_trusted(owner: int) -> bool:
    """Return whether files of this owner are read even if everybody may write to the directory."""
    return owner in (0, os.geteuid())


def name_of(owner: int) -> str:
    """Return a user's name."""
    import pwd  # only error texts need it

    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"


def advice_for(folder: str) -> str:
    """Return advice for the end of an error text about a folder that everybody may write to."""
    return f"Then forbid others to write to the folder (chmod o-w {folder}), or use another cache_directory."
