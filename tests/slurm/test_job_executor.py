"""SlurmJobExecutor inside allocations of a real Slurm: programs that `salloc` runs, on two nodes of four CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conftest import missing_for_mpi
from executorlib import SlurmClusterExecutor

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

SECONDS = 100.0

PRELUDE = """\
import collections, json, os, signal, subprocess, sys, time
from executorlib import SlurmJobExecutor


def node(*args):
    return os.environ["SLURMD_NODENAME"]


def variable(name):
    return os.environ.get(name)


def agent():
    "The process id of what runs on this node for the executor: the parent of the node agent."
    with open(f"/proc/{os.getppid()}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def wait_on(path, *args):
    while not os.path.exists(path):
        time.sleep(0.01)
    return node()


def steps():
    command = ["squeue", "--noheader", "--steps", "--format=%i", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [line for line in lines if not line.endswith((".extern", ".batch", ".interactive"))]


def wait_for_end_of_steps():
    # The controller hears of it from the nodes, maybe after srun has exited.
    while steps():
        time.sleep(0.1)


"""


def inside(folder: Path, source: str, *options: str, code: int = 0) -> str:
    """Run a program in an allocation; what it prints."""
    path = folder / "program.py"
    path.write_text(PRELUDE + textwrap.dedent(source))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_JOB", "SLURM_N"))}
    done = subprocess.run(
        ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=4", "--time=5", *options, sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_calls_run_on_all_nodes_and_leave_nothing(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        with SlurmJobExecutor() as executor:
            assert executor.info["max_workers"] == 8
            gated = [executor.submit(wait_on, "open") for _ in range(8)]
            queued = [executor.submit(os.getpid) for _ in range(20)]
            while not all(future.running() for future in gated):
                time.sleep(0.01)
            assert {node["free_cores"] for node in executor.info["nodes"].values()} == {0}
            assert len(steps()) == 1
            open("open", "w").close()
            print(sorted(collections.Counter(future.result() for future in gated).values()))
            assert len({future.result() for future in queued}) == 20
            assert len(steps()) == 1
        wait_for_end_of_steps()
        """,
    )
    assert out == "[4, 4]\n"


def test_what_a_call_sees(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        def gpus():
            return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_STEP_ID")

        with SlurmJobExecutor(resource_dict={"gpus_per_core": 1}) as executor:
            os.environ["LATER"] = "set"
            print(executor.submit(variable, "LATER").result())
            gated = [executor.submit(wait_on, "open") for _ in range(3)]
            seen = executor.submit(gpus).result()
            open("open", "w").close()
            assert seen[0] in ("0", "1"), seen
            assert seen[1:] == (os.environ["SLURM_JOB_ID"], None)
            print("printed", flush=True)
            executor.submit(print, "in a call").result()
        """,
        "--gpus-per-node=2",
    )
    assert out == "set\nprinted\nin a call\n"


def test_block(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        def start():
            return {"base": 100}

        def add(x, base):
            return base + x

        with SlurmJobExecutor(block_allocation=True, init_function=start) as executor:
            assert executor.max_workers == 8
            assert list(executor.map(add, range(2000))) == list(range(100, 2100))
            # One long call with short ones behind it: they are taken back and run elsewhere.
            gated = [executor.submit(wait_on, "open")]
            print(sum(executor.map(abs, range(500))))
            open("open", "w").close()
        """,
    )
    assert out == "124750\n"


@pytest.mark.parametrize("block", [False, True])
def test_lost_agent(tmp_path: Path, block: bool) -> None:
    """Calls on its node fail with the node's name; the others go on."""
    out = inside(
        tmp_path,
        f"""
        with SlurmJobExecutor(block_allocation={block}) as executor:
            pid, name = executor.submit(agent), executor.submit(node)
            pid.result(), name.result()
            gated = [executor.submit(wait_on, "open", index) for index in range(8)]
            while not all(future.running() for future in gated):
                time.sleep(0.01)
            os.kill(pid.result(), signal.SIGKILL)
            while sum(future.done() for future in gated) < 4:
                time.sleep(0.01)
            later = [executor.submit(node) for _ in range(10)]
            open("open", "w").close()
            errors = [error for error in (future.exception() for future in gated) if error]
            assert len(errors) == 4, errors
            (left,) = executor.info["nodes"]
            assert {{future.result() for future in later}} == {{left}}
            assert "was lost" in str(errors[0])
            assert f"node {{left}} was lost" not in str(errors[0])
            print(type(errors[0]).__name__)
        """,
    )
    assert out == "ExecutorlibSocketError\n"


def throw_away() -> bool:
    """Return whether this is the cluster that tests/slurm/cluster starts, whose nodes may be set down."""
    conf = Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf"))
    return conf.is_file() and "ClusterName=virtual\n" in conf.read_text()


@pytest.mark.skipif(not throw_away(), reason="sets nodes down, of which only tests/slurm/cluster's may be")
@pytest.mark.parametrize("block", [False, True])
def test_node_that_fails(tmp_path: Path, block: bool) -> None:
    """Slurm sets one of four nodes down: its calls fail, finished results are kept, and the others go on."""
    out = inside(
        tmp_path,
        f"""
        def power(number):
            time.sleep(0.02)  # very short calls are handed to workers of a block before it is their turn
            return 2**number

        with SlurmJobExecutor(block_allocation={block}) as executor:
            done = [executor.submit(power, number) for number in range(100)]
            assert done[-1].result() == 2**99
            gated = [executor.submit(wait_on, "open", index) for index in range(16)]
            queued = [executor.submit(node) for _ in range(100)]
            while not all(future.running() for future in gated):
                time.sleep(0.01)
            subprocess.run(["scontrol", "update", "nodename=node3", "state=down", "reason=test"], check=True)
            while sum(future.done() for future in gated) < 4:
                time.sleep(0.01)
            open("open", "w").close()
            assert [future.result() for future in done] == [2**number for number in range(100)]
            assert {{future.result() for future in queued}} <= {{"node1", "node2", "node4"}}
            errors = [error for error in (future.exception() for future in gated) if error]
            assert all("node node3 was lost" in str(error) for error in errors), errors
            print(len(errors), *executor.info["nodes"])
        wait_for_end_of_steps()
        """,
        "--nodes=4",
        "--no-kill",
    )
    assert out == "4 node1 node2 node4\n"
    # It may be up again by itself: its daemon lives.
    subprocess.run(["scontrol", "update", "NodeName=node3", "State=RESUME"], capture_output=True, timeout=SECONDS)


@pytest.mark.skipif(not throw_away(), reason="sets nodes down, of which only tests/slurm/cluster's may be")
def test_calls_of_a_node_that_fails_run_again(tmp_path: Path) -> None:
    """Both calls on that node alone, and a call over several nodes, which is a step of its own."""
    out = inside(
        tmp_path,
        """
        def place(name, *args):
            open(f"{name} {node()}", "w").close()
            return wait_on("open")

        with SlurmJobExecutor(restart_limit=1) as executor:
            assert executor.submit(abs, -1).result() == 1
            calls = [executor.submit(place, str(index)) for index in range(12)]
            options = {"slurm_cmd_args": ["--comment=mine"]}
            step = executor.submit(place, "step", resource_dict=options)
            while not (len([name for name in os.listdir() if " node" in name]) == 13):
                time.sleep(0.01)
            place_of_step, = [name.split()[1] for name in os.listdir() if name.startswith("step ")]
            subprocess.run(["scontrol", "update", f"nodename={place_of_step}", "state=down", "reason=test"], check=True)
            while place_of_step in executor.info["nodes"]:
                time.sleep(0.01)
            open("open", "w").close()
            places = {future.result() for future in calls}
            assert step.result()  # anywhere: Slurm may have set the node up again by itself
            assert len(executor.info["nodes"]) == 3
            print(places <= set(executor.info["nodes"]))
            open("lost", "w").write(place_of_step)
        """,
        "--nodes=4",
        "--no-kill",
    )
    assert out == "True\n"
    lost = (tmp_path / "lost").read_text()
    subprocess.run(["scontrol", "update", f"NodeName={lost}", "State=RESUME"], capture_output=True, timeout=SECONDS)


def test_cancelled_job(tmp_path: Path) -> None:
    """No call hangs when the allocation is cancelled, and no step of agents or ranks is left."""
    out = inside(
        tmp_path,
        """
        with SlurmJobExecutor() as executor:
            gated = [executor.submit(wait_on, "never") for _ in range(12)]
            step = executor.submit(wait_on, "never", resource_dict={"slurm_cmd_args": ["--job-name=mine"]})
            while sum(future.running() for future in gated) < 8:
                time.sleep(0.01)
            subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=True)
            errors = [future.exception(60) for future in [*gated, step]]
            assert all(errors)
            print("was lost" in str(errors[0]), "failed" in str(errors[11]))
        wait_for_end_of_steps()
        """,
        code=0,
    )
    assert out == "True True\n"


@pytest.mark.skipif(bool(missing_for_mpi()), reason=f"needs {', '.join(missing_for_mpi())}")
def test_ranks(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        def rank():
            from mpi4py import MPI
            return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), node()

        with SlurmJobExecutor() as executor:
            on_one = executor.submit(rank, resource_dict={"cores": 2}).result()
            over_two = executor.submit(rank, resource_dict={"cores": 2, "num_nodes": 2}).result()
            assert [each[:2] for each in on_one] == [each[:2] for each in over_two] == [(0, 2), (1, 2)]
            print(len({each[2] for each in on_one}), len({each[2] for each in over_two}))
        """,
    )
    assert out == "1 2\n"


@pytest.mark.skipif(bool(missing_for_mpi()), reason=f"needs {', '.join(missing_for_mpi())}")
def test_ranks_that_do_not_find_each_other(tmp_path: Path) -> None:
    """The call fails with the reason instead of returning results of worlds of one. Other calls run."""
    out = inside(
        tmp_path,
        """
        with SlurmJobExecutor(pmi_mode="none") as executor:
            for needs in ({"cores": 2}, {"cores": 2, "num_nodes": 2}):
                error = executor.submit(node, resource_dict=needs).exception()
                print(type(error).__name__, "world of size 1" in str(error), "pmi_mode='pmi2'" in str(error))
            assert executor.submit(abs, -1).result() == 1
        wait_for_end_of_steps()
        """,
    )
    assert out == "RuntimeError True True\nRuntimeError True True\n"


def spread_here(count: int) -> tuple[dict[str, int], list[int]]:
    """A call that has an allocation to itself, and spreads calls of its own over it."""
    from executorlib import SlurmJobExecutor

    with SlurmJobExecutor() as executor:
        cores = {name: node["cores"] for name, node in executor.info["nodes"].items()}
        return cores, list(executor.map(abs, range(-count, 0)))


def test_in_a_call_that_is_a_job(tmp_path: Path) -> None:
    over_two = {"slurm_cmd_args": ["--nodes=2", "--ntasks=8"]}
    with SlurmClusterExecutor(cache_directory=tmp_path / "cache") as executor:
        on_one = executor.submit(spread_here, 10, resource_dict={"threads_per_core": 3})
        on_two = executor.submit(spread_here, 20, resource_dict=over_two)
        cores, results = on_one.result(SECONDS)
        assert list(cores.values()) == [3]
        assert results == list(range(10, 0, -1))
        cores, results = on_two.result(SECONDS)
        assert list(cores.values()) == [4, 4]
        assert results == list(range(20, 0, -1))


def test_options_for_srun(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        with SlurmJobExecutor() as executor:
            options = {"slurm_cmd_args": ["--job-name=mine"]}
            print(executor.submit(variable, "SLURM_JOB_NAME", resource_dict=options).result())
            with_step = executor.submit(variable, "SLURM_STEP_ID", resource_dict=options).result()
            assert int(with_step) > 0
        """,
    )
    assert out == "mine\n"


def test_calls_that_do_not_fit(tmp_path: Path) -> None:
    inside(
        tmp_path,
        """
        with SlurmJobExecutor() as executor:
            for needs in ({"cores": 9}, {"cores": 3, "num_nodes": 3}, {"threads_per_core": 5}, {"gpus_per_core": 1}):
                try:
                    executor.submit(node, resource_dict=needs)
                except ValueError as error:
                    assert "larger allocation" in str(error)
                else:
                    raise AssertionError(needs)
        """,
    )


# The contract suite over this executor's rows, in parts.
CONTRACT = {
    "values": [
        "contract/test_inputs.py",
        "contract/test_futures.py",
        "contract/test_errors.py",
        "contract/test_map.py",
    ],
    "workers": [
        "contract/test_block.py",
        "contract/test_scheduling.py",
        "contract/test_mpi.py",
        "contract/test_submit.py",
    ],
    "ends": ["contract/test_lifecycle.py", "contract/test_workflow.py", "faults/test_table.py"],
}


@pytest.mark.timeout(960)  # a minute or two, but on a machine that is busy otherwise
@pytest.mark.parametrize("part", CONTRACT)
def test_contract(part: str) -> None:
    tests = Path(__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_JOB")}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "slurm-job", "-p", "no:cacheprovider", "--timeout=300"]
    files = [str(tests / each) for each in CONTRACT[part]]
    done = subprocess.run(
        ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=4", *command, *files],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
