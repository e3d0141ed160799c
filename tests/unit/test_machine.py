"""The machine's resources, read from trees as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from executorlib import machine
from executorlib.machine import _cgroup_cpus, _mounted_on, is_local_disk, usable_cpus, visible_gpus


def tree(root: Path, files: dict[str, str]) -> None:
    """Write files below a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def cgroup_v1(root: Path, groups: dict[str, int]) -> None:
    """Quotas in the period of 100 ms by group; "" is the root."""
    for group, quota in groups.items():
        tree(root / "cpu" / group, {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"})


# Control groups: who is in which (/proc/self/cgroup), what the groups allow, CPUs.
V2 = [
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {}, None),  # the real root has no limit
    ("0::/job\n", {"job/cpu.max": "200000 50000\n"}, 4.0),
    ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2.0),
    ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "50000 100000\n"}, 0.5),
    ("0::/job/step\n", {"job/cpu.max": "50000 100000\n", "job/step/cpu.max": "200000 100000\n"}, 0.5),
    ("0::/job\n", {"other/cpu.max": "50000 100000\n"}, None),
    # A container that sees its own group as root, but reads the host's path.
    ("0::/docker/8f2a\n", {"cpu.max": "300000 100000\n"}, 3.0),
    # Outside of the name space's root.
    ("0::/../../job\n", {"cpu.max": "300000 100000\n"}, 3.0),
    ("0::/job\n", {"job/cpu.max": "nonsense\n"}, None),
    ("0::/job\n", {"job/cpu.max": ""}, None),
    ("0::/job with space:and colon\n", {"job with space:and colon/cpu.max": "100000 100000\n"}, 1.0),
]


@pytest.mark.parametrize(("membership", "files", "cpus"), V2)
def test_cgroup_v2(tmp_path: Path, membership: str, files: dict[str, str], cpus: float | None) -> None:
    (tmp_path / "cgroup").write_text(membership)
    root = tmp_path / "fs"
    root.mkdir()
    tree(root, files)
    assert _cgroup_cpus(tmp_path / "cgroup", root) == cpus


V1 = [
    ({"": -1}, "/", None),
    ({"": 250_000}, "/", 2.5),
    ({"": -1, "slurm/job1": 400_000, "slurm": -1}, "/slurm/job1", 4.0),
    ({"slurm": 200_000, "slurm/job1": 400_000}, "/slurm/job1", 2.0),
    ({"": 150_000}, "/docker/8f2a", 1.5),
    ({"slurm/job2": 100_000}, "/slurm/job1", None),
]


@pytest.mark.parametrize(("groups", "own", "cpus"), V1)
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_cgroup_v1(tmp_path: Path, groups: dict[str, int], own: str, cpus: float | None, controllers: str) -> None:
    (tmp_path / "cgroup").write_text(f"12:cpuset:/elsewhere\n5:{controllers}:{own}\n1:name=systemd:/x\n")
    cgroup_v1(tmp_path / "fs", groups)
    cgroup_v1(tmp_path / "fs", {"elsewhere": 10_000, "x": 10_000})  # not ours, as far as CPUs go
    assert _cgroup_cpus(tmp_path / "cgroup", tmp_path / "fs") == cpus


def test_cgroup_hybrid(tmp_path: Path) -> None:
    """Both at once, as systemd mounts them: the CPU controller is in one of them."""
    (tmp_path / "cgroup").write_text("4:cpu,cpuacct:/job\n0::/job\n")
    tree(tmp_path / "fs" / "unified", {"job/cgroup.procs": "1\n"})
    cgroup_v1(tmp_path / "fs", {"job": 300_000})
    assert _cgroup_cpus(tmp_path / "cgroup", tmp_path / "fs") == 3.0


def test_no_cgroups(tmp_path: Path) -> None:
    """Not Linux, or no /proc."""
    assert _cgroup_cpus(tmp_path / "nothing", tmp_path) is None


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "0::\n"])
def test_strange_membership(tmp_path: Path, text: str) -> None:
    (tmp_path / "cgroup").write_text(text)
    assert _cgroup_cpus(tmp_path / "cgroup", tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs CPU affinity")
@pytest.mark.parametrize(
    ("affinity", "quota", "cpus"),
    [
        ({3, 1, 2}, None, [1, 2, 3]),
        ({3, 1, 2}, 8.0, [1, 2, 3]),
        ({3, 1, 2}, 1.0, [1]),
        ({3, 1, 2}, 1.1, [1, 2]),  # rounded up
        ({3, 1, 2}, 0.1, [1]),  # never none
    ],
)
def test_usable_cpus(monkeypatch: pytest.MonkeyPatch, affinity: set[int], quota: float | None, cpus: list[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity)
    monkeypatch.setattr(machine, "_cgroup_cpus", lambda membership, root: quota)
    assert usable_cpus() == cpus


@pytest.mark.parametrize(("count", "cpus"), [(4, [0, 1, 2, 3]), (None, [0])])
def test_usable_cpus_without_affinity(monkeypatch: pytest.MonkeyPatch, count: int | None, cpus: list[int]) -> None:
    """macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    monkeypatch.setattr(machine, "_cgroup_cpus", lambda membership, root: None)
    assert usable_cpus() == cpus


def test_usable_cpus_of_this_machine() -> None:
    cpus = usable_cpus()
    assert 1 <= len(cpus) <= (os.cpu_count() or 1)
    assert cpus == sorted(set(cpus))


# GPUs.


@pytest.fixture
def machine_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that takes the place of / for the module."""

    def moved(path: str) -> Path:
        return tmp_path / path.lstrip("/")

    monkeypatch.setattr(machine, "Path", moved)
    return tmp_path


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("0", ["0"]),
        ("2,0", ["2", "0"]),
        (" 0 , 1 ,", ["0", "1"]),
        ("GPU-8932f937,MIG-1/2/3", ["GPU-8932f937", "MIG-1/2/3"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),  # Slurm's way to say "none"
    ],
)
def test_gpus_from_the_environment(machine_root: Path, variable: str, value: str, gpus: list[str]) -> None:
    tree(machine_root, {f"proc/driver/nvidia/gpus/{bus}/information": "" for bus in "abcd"})
    assert visible_gpus({variable: value, "OTHER": "7"}) == gpus


def test_gpus_of_an_environment_that_names_both(machine_root: Path) -> None:
    assert visible_gpus({"ROCR_VISIBLE_DEVICES": "0,1,2", "CUDA_VISIBLE_DEVICES": "1"}) == ["1"]


def test_gpus_of_nvidia(machine_root: Path) -> None:
    tree(machine_root, {f"proc/driver/nvidia/gpus/0000:{bus}:00.0/information": "" for bus in ("1a", "2b", "3c")})
    assert visible_gpus({}) == ["0", "1", "2"]


def test_gpus_of_amd(machine_root: Path) -> None:
    """CPUs are nodes of that topology, too; they have no SIMD units."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    tree(
        machine_root,
        {
            f"{nodes}/0/properties": "cpu_cores_count 64\nsimd_count 0\n",
            f"{nodes}/1/properties": "cpu_cores_count 0\nsimd_count 440\n",
            f"{nodes}/2/properties": "cpu_cores_count 0\nsimd_count 440\n",
            f"{nodes}/3/properties": "cut sho\nrt\n",
            f"{nodes}/4/name": "",
        },
    )
    assert visible_gpus({}) == ["0", "1"]


def test_no_gpus(machine_root: Path) -> None:
    assert visible_gpus({}) == []


def test_gpus_by_this_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    found: Any = visible_gpus()
    assert found == ["5"]


# Disks. A folder for NFS below a local one, with another local one in it; one that was mounted over; one with a space.
MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:40 / /home rw,relatime - nfs4 server:/home rw
23 22 8:2 / /home/me/disk rw - xfs /dev/sdb rw
24 21 8:3 / /data rw - ext4 /dev/sdc rw
25 24 0:41 / /data rw master:5 - lustre server:/data rw
26 21 8:4 / /with\\040space rw - btrfs /dev/sdd rw
"""


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/", True),
        ("/homes/me", True),
        ("/home", False),
        ("/home/me/cache", False),
        ("/home/me/disk/cache", True),
        ("/data/cache", False),
        ("/with space/cache", True),
    ],
)
def test_local_disks(path: str, local: bool) -> None:
    assert _mounted_on(path, MOUNTS) is local


def test_disk_of_this_machine() -> None:
    assert isinstance(is_local_disk("/no/such/folder"), bool)
    assert not _mounted_on("/", "")


def test_open_files_are_counted_where_no_folder_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = machine._open_files(1024)

    def refuse(folder: str) -> Any:
        raise FileNotFoundError(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    # Listing opens one more.
    assert machine._open_files(1024) in (listed - 1, listed)
