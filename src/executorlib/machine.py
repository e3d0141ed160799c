"""Finds the CPUs that this process may use, and the machine's GPUs."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class NodeShape(NamedTuple):
    """A node of an allocation.

    Attributes:
        name: The node's name in Slurm.
        cpus: CPUs that the job has there.
        gpus: Indices of the GPUs that the job has there, as Slurm counts them on the node.
    """

    name: str
    cpus: int
    gpus: tuple[str, ...] = ()


# File systems of a single machine, which show at once what another process has written.
_LOCAL_DISKS = re.compile(r"ext[234]|xfs|btrfs|zfs|bcachefs|f2fs|jfs|reiserfs|tmpfs|ramfs|overlay|vfat|exfat|ntfs3?")


def usable_cpus() -> list[int]:
    """Return the CPUs that this process may use.

    This takes into account the scheduling affinity and, rounded up, the CPU bandwidth that the process's control groups
    allow (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`; see the kernel's cgroup documentation).

    Returns:
        CPU numbers, at least one.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = sorted(os.sched_getaffinity(0)) if has_affinity else list(range(os.cpu_count() or 1))
    quota = _cgroup_cpus(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if quota is not None:
        cpus = cpus[: max(1, math.ceil(quota))]
    return cpus


def _cgroup_cpus(membership: Path, root: Path) -> float | None:
    """Return the smallest CPU bandwidth, in CPUs, on the way from the process's control group to the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        group = base / path.lstrip("/")
        while True:
            limits.append(_group_limit(group))
            if group == base or base not in group.parents:
                break
            group = group.parent
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _group_limit(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    if quota == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)


# Left for the rest of the program if the limit has to be raised.
_SPARE_FILES = 256


_MOST_DESCRIPTORS = 4096


def room_for_files(count: int) -> int:
    """Return how many more files this process may open.

    If necessary, its soft limit is raised, as far as the hard limit allows and only as far as ``count`` files require.
    The soft limit protects programs that cannot handle descriptors above 1023, and raising it does not give them any.

    Args:
        count: How many are wanted.

    Returns:
        How many may be opened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _open_files(soft)
    wanted = used + count + _SPARE_FILES
    if soft == resource.RLIM_INFINITY:
        return count
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has another limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
    return soft - used


def _open_files(limit: int) -> int:
    """Return how many files this process has open."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    # If neither is mounted, count descriptors with low numbers, which are used first.
    count = 0
    for descriptor in range(min(limit, _MOST_DESCRIPTORS) if limit != resource.RLIM_INFINITY else _MOST_DESCRIPTORS):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            count += 1
    return count


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs of this machine, as `CUDA_VISIBLE_DEVICES` would name them.

    `CUDA_VISIBLE_DEVICES` or `ROCR_VISIBLE_DEVICES` limits them if it is set. If not, NVIDIA's driver
    (`/proc/driver/nvidia/gpus`) and then AMD's (`/sys/class/kfd`) are asked, without loading any library.
    """
    for variable in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if variable in environ:
            names = [name.strip() for name in environ[variable].split(",") if name.strip()]
            if names == ["NoDevFiles"]:  # Slurm's way to say "none"
                return []
            # CUDA ignores everything from the first invalid index on; -1 is the common way to say "none".
            return names[: names.index("-1")] if "-1" in names else names
    nvidia = Path("/proc/driver/nvidia/gpus")
    if nvidia.is_dir():
        return [str(index) for index, _ in enumerate(nvidia.iterdir())]
    amd = 0
    for properties in Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            values = dict(line.split(maxsplit=1) for line in properties.read_text().splitlines())
        except (OSError, ValueError):
            continue
        amd += int(values.get("simd_count", "0")) > 0
    return [str(index) for index in range(amd)]


def process_start(pid: int) -> str:
    """Return when a process started, in the kernel's ticks since boot; empty on systems other than Linux."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[19]
    return ""


def is_running(pid: int, started: str) -> bool:
    """Return True if a process of this machine still exists and its number has not gone to another one.

    Args:
        pid: The process's number.
        started: What `process_start` returned for it.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return not started or process_start(pid) == started


@functools.lru_cache(maxsize=64)
def is_local_disk(folder: str) -> bool:
    """Return True if a folder is known to be on a file system that no other machine writes to. Linux only.

    Args:
        folder: The folder's path.
    """
    try:
        return _mounted_on(os.path.realpath(folder), Path("/proc/self/mountinfo").read_text(errors="replace"))
    except OSError:
        return False


def _mounted_on(path: str, mounts: str) -> bool:
    """Return True if a path is on a local disk by ``/proc/self/mountinfo``. The last mount on a folder counts."""
    longest, kind = -1, ""
    for line in mounts.splitlines():
        fields, _, source = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4])
        if len(point) >= longest and (path == point or path.startswith(point.rstrip("/") + "/")):
            longest, kind = len(point), source.partition(" ")[0]
    return _LOCAL_DISKS.fullmatch(kind) is not None
