"""The resources of a Slurm job, read from text that Slurm 22.05 wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from executorlib.launchers.hostlist import expand_hosts, expand_ranges, expand_repeated
from executorlib.machine import NodeShape
from executorlib.slurm.allocation import shapes_from_environment, shapes_from_scontrol, slurm_allocation

# salloc -w node1,node3,node4 -n7 --gres=gpu:1
UNEQUAL = """\
JobId=4532 JobName=interactive
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901563 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   StartTime=2026-11-22T17:25:26 EndTime=2026-11-22T18:25:26 Deadline=N/A
   ReqNodeList=node[1,3-4] ExcNodeList=(null)
   NodeList=node[1,3-4]
   BatchHost=node1
   NumNodes=3 NumCPUs=7 NumTasks=7 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=7,mem=3.50G,node=3,billing=7
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   JOB_GRES=gpu:3
     Nodes=node1 CPU_IDs=0-3 Mem=2048 GRES=gpu:1(IDX:0)
     Nodes=node3 CPU_IDs=0-1 Mem=1024 GRES=gpu:1(IDX:0)
     Nodes=node4 CPU_IDs=0 Mem=512 GRES=gpu:1(IDX:0)
   MinCPUsNode=1 MinMemoryCPU=512M MinTmpDiskNode=0
   Power=
   TresPerNode=gres:gpu:1
"""

# salloc -N3 -n3 --gres=gpu:2 --mem=1000, beside another job that had CPUs 0 to 2
EQUAL = """\
JobId=4527 JobName=interactive
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=node[1-3]
   NumNodes=3 NumCPUs=3 NumTasks=3 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=3,mem=3000M,node=3,billing=3
     Nodes=node[1-3] CPU_IDs=3 Mem=1000 GRES=gpu:2(IDX:0-1)
   MinCPUsNode=1 MinMemoryNode=1000M MinTmpDiskNode=0
"""

# salloc -N1 -n2 --ntasks-per-node=2 : -N1 -n3
HETEROGENEOUS = """\
JobId=4529 HetJobId=4529 HetJobOffset=0 JobName=interactive
   HetJobIdSet=4529-4530
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=node1
     Nodes=node1 CPU_IDs=0-1 Mem=1024 GRES=
   MinCPUsNode=2 MinMemoryCPU=512M MinTmpDiskNode=0

JobId=4530 HetJobId=4529 HetJobOffset=1 JobName=interactive
   HetJobIdSet=4529-4530
   JobState=RUNNING Reason=None Dependency=(null)
   NodeList=node2
     Nodes=node2 CPU_IDs=0-2 Mem=1536 GRES=
   MinCPUsNode=1 MinMemoryCPU=512M MinTmpDiskNode=0
"""

OVER = """\
JobId=4532 JobName=interactive
   JobState=COMPLETED Reason=None Dependency=(null)
   NodeList=node[1,3-4]
   MinCPUsNode=1 MinMemoryCPU=512M MinTmpDiskNode=0
"""


def line(nodes: str, cpus: str, memory: str, rest: str) -> str:
    return f"JobId=1 JobName=x\n     Nodes={nodes} CPU_IDs={cpus} Mem={memory}{rest}\n"


@pytest.mark.parametrize(
    ("text", "job", "shapes"),
    [
        pytest.param(
            UNEQUAL,
            "4532",
            [
                NodeShape("node1", 4, ("0",)),
                NodeShape("node3", 2, ("0",)),
                NodeShape("node4", 1, ("0",)),
            ],
            id="nodes of different shapes",
        ),
        pytest.param(
            EQUAL,
            "4527",
            [NodeShape(f"node{number}", 1, ("0", "1")) for number in (1, 2, 3)],
            id="one line for all",
        ),
        pytest.param(HETEROGENEOUS, "4529", [NodeShape("node1", 2)], id="first component"),
        pytest.param(HETEROGENEOUS, "4530", [NodeShape("node2", 3)], id="second component"),
        pytest.param(HETEROGENEOUS, "452", [], id="another job"),
        pytest.param(OVER, "4532", [], id="over"),
        pytest.param(
            line("a", "0-3,8-11", "0", " GRES=gpu:a100:2(IDX:1,3),gpu:v100:1(IDX:5),nvme:1(IDX:7)"),
            "1",
            [NodeShape("a", 8, ("1", "3", "5"))],
            id="GPUs of two types",
        ),
        pytest.param(line("a", "0", "9", " GRES=mps:50(IDX:0)"), "1", [NodeShape("a", 1)], id="no whole GPU"),
        pytest.param(
            line("a", "0", "9", " GRES_IDX=gpu(IDX:0-1)"), "1", [NodeShape("a", 1, ("0", "1"))], id="before 20.02"
        ),
        pytest.param(line("a", "0", "9", ""), "1", [NodeShape("a", 1)], id="no GRES at all"),
    ],
)
def test_scontrol(text: str, job: str, shapes: list[NodeShape]) -> None:
    assert shapes_from_scontrol(text, job) == shapes


@pytest.mark.parametrize(
    ("environ", "shapes"),
    [
        pytest.param(
            {"SLURM_JOB_NODELIST": "node[1,3-4]", "SLURM_JOB_CPUS_PER_NODE": "4,2,1"},
            [NodeShape("node1", 4), NodeShape("node3", 2), NodeShape("node4", 1)],
            id="shapes",
        ),
        pytest.param(
            {"SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_CPUS_PER_NODE": "1(x3)"},
            [NodeShape(f"node{number}", 1) for number in (1, 2, 3)],
            id="equal shapes",
        ),
        pytest.param(
            {
                "SLURM_JOB_NODELIST": "node1",
                "SLURM_JOB_CPUS_PER_NODE": "4",
                "SLURM_JOB_GPUS": "1,3",
                "SLURM_GPUS_ON_NODE": "2",
            },
            [NodeShape("node1", 4, ("1", "3"))],
            id="GPUs by index",
        ),
        pytest.param(
            {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_CPUS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "2"},
            [NodeShape("node1", 4, ("0", "1"))],
            id="number of GPUs",
        ),
    ],
)
def test_environment(environ: dict[str, str], shapes: list[NodeShape]) -> None:
    assert shapes_from_environment(environ) == shapes


@pytest.mark.parametrize(
    "environ",
    [{}, {"SLURM_JOB_NODELIST": "a,b"}, {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_CPUS_PER_NODE": "4(x3)"}],
    ids=str,
)
def test_environment_without_cpus(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="bin folder on PATH"):
        shapes_from_environment(environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("node[1,3-4]", ["node1", "node3", "node4"]),
        ("login,n[09-11],a-b", ["login", "n09", "n10", "n11", "a-b"]),
        ("rack[0-1]n[2-3]", ["rack0n2", "rack0n3", "rack1n2", "rack1n3"]),
        ("gpu[1-2]-ib,x", ["gpu1-ib", "gpu2-ib", "x"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_numbers() -> None:
    assert expand_ranges("0-2,5") == [0, 1, 2, 5]
    assert expand_ranges("") == []
    assert expand_repeated("4(x2),1") == [4, 4, 1]


def with_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a command called scontrol first on PATH."""
    command = folder / "scontrol"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


ENVIRONMENT = {"SLURM_JOB_ID": "4532", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_CPUS_PER_NODE": "4"}


def test_scontrol_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scontrol(tmp_path, monkeypatch, f'[ "$*" = "show job -d 4532" ] && cat <<"end"\n{UNEQUAL}\nend')
    assert [shape.cpus for shape in slurm_allocation(ENVIRONMENT)] == [4, 2, 1]


def test_environment_is_read_if_scontrol_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scontrol(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert slurm_allocation(ENVIRONMENT) == [NodeShape("node1", 4)]


def test_environment_is_read_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_allocation(ENVIRONMENT) == [NodeShape("node1", 4)]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "does not know job 4532.*SLURM_JOB_ID"),
        (f'cat <<"end"\n{OVER}\nend', r"4532.*has no nodes \(state COMPLETED\).*salloc"),
    ],
)
def test_job_that_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, text: str) -> None:
    with_scontrol(tmp_path, monkeypatch, script)
    with pytest.raises(ValueError, match=text):
        slurm_allocation(ENVIRONMENT)


def test_no_allocation() -> None:
    with pytest.raises(
        ValueError, match=r"SLURM_JOB_ID is not set.*sbatch or salloc.*SlurmClusterExecutor.*SingleNode"
    ):
        slurm_allocation({})
