"""``cores=n``: the function runs on every rank of an MPI world and the result is a list."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import children
from contract.functions import (
    CustomError,
    Gate,
    add,
    die_on_a_rank,
    environment,
    identity,
    raise_on,
    rank,
    rank_sum,
    rank_that_fails,
    rest,
    until,
    wait_until_gone,
)
from executorlib.single_node import mpi

WAIT = 50
pytestmark = pytest.mark.mpi
TWO = {"cores": 2}


@pytest.mark.essential
@pytest.mark.rows("fork", "spawn", "block-fork", "jobs", "slurm")
def test_results_of_all_ranks_in_order(make_executor: Callable[..., Any]) -> None:
    with make_executor(max_cores=4, resource_dict=TWO) as executor:
        assert executor.submit(rank, "x").result(WAIT) == [(0, 2, "x"), (1, 2, "x")]
        # The same for functions that know nothing of MPI, and for communication between ranks.
        assert executor.submit(add, 1, b=2).result(WAIT) == [3, 3]
        assert executor.submit(rank_sum, 2.0).result(WAIT) == [6.0, 6.0]


@pytest.mark.rows("fork", "jobs")
def test_one_core_gives_a_plain_result(make_executor: Callable[..., Any]) -> None:
    with make_executor(max_cores=2) as executor:
        wide = executor.submit(rank, resource_dict=TWO)
        plain = executor.submit(add, 1, 2)
        assert plain.result(WAIT) == 3
        dependent = executor.submit(identity, [wide, plain])
        assert dependent.result(WAIT) == [[(0, 2, None), (1, 2, None)], 3]


@pytest.mark.long
@pytest.mark.essential
@pytest.mark.rows("block-fork", "block-slurm")
def test_a_block_of_worlds(make_executor: Callable[..., Any]) -> None:
    """A world lives on from call to call."""

    def pid() -> int:
        return os.getpid()

    with make_executor(max_workers=1, max_cores=2, resource_dict=TWO) as executor:
        first, second = (executor.submit(pid).result(WAIT) for _ in range(2))
        assert first == second
        assert len(set(first)) == 2
        assert executor.submit(rank).result(WAIT) == [(0, 2, None), (1, 2, None)]


@pytest.mark.long
@pytest.mark.essential
@pytest.mark.rows("block-fork", "block-slurm")
def test_init_function_on_every_rank(make_executor: Callable[..., Any]) -> None:
    def prepare() -> dict[str, Any]:
        from mpi4py import MPI

        return {"own": MPI.COMM_WORLD.Get_rank() * 10}

    def use(own: int) -> int:
        return own

    options: dict[str, Any] = {"max_workers": 1, "max_cores": 2, "resource_dict": TWO}
    with make_executor(init_function=prepare, **options) as executor:
        assert executor.submit(use).result(WAIT) == [0, 10]


@pytest.mark.long
@pytest.mark.essential
@pytest.mark.rows("fork", "block-fork", "jobs", "block-slurm")
@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_raises(make_executor: Callable[..., Any], bad: int) -> None:
    """Its exception is the call's, and the ranks that wait for it end."""
    with make_executor(max_workers=1, max_cores=2, resource_dict=TWO) as executor:
        error = executor.submit(rank_that_fails, bad).exception(WAIT)
        assert isinstance(error, CustomError)
        assert str(error) == f"rank {bad}"
        assert "in rank_that_fails" in str(error.__cause__)
        assert executor.submit(add, 1, 2).result(WAIT) == [3, 3]


@pytest.mark.rows("fork", "jobs")
def test_all_ranks_raise(make_executor: Callable[..., Any]) -> None:
    def every_rank() -> None:
        raise CustomError("everywhere")

    with make_executor(max_workers=1, max_cores=2, resource_dict=TWO) as executor:
        assert isinstance(executor.submit(every_rank).exception(WAIT), CustomError)


@pytest.mark.rows("fork")
def test_resources_of_ranks(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    own = {
        "cores": 2,
        "threads_per_core": 2,
        "gpus_per_core": 1,
        "cwd": str(tmp_path / "new"),
    }

    def seen() -> list[Any]:
        return [os.getcwd(), *environment("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]

    with make_executor(max_cores=4, gpus=2) as executor:
        first, second = executor.submit(seen, resource_dict=own).result(WAIT)
    assert first[:2] == second[:2] == [own["cwd"], "2"]
    # Each rank sees its own device or all of the call's; in either case they are the call's.
    assert set(",".join([first[2], second[2]]).split(",")) == {"0", "1"}


@pytest.mark.rows("fork", "jobs")
def test_run_time_max_of_ranks(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """The limit is for the call, so that it is long enough for the ranks to start."""
    held = gate()
    own = {"cores": 2, "run_time_max": 5}
    with make_executor(max_cores=2) as executor:
        future = executor.submit(held, resource_dict=own)
        pids = held.pids(2)
        assert isinstance(future.exception(WAIT), TimeoutError)
        wait_until_gone(*pids)
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.rows("fork", "jobs")
def test_cores_of_ranks_are_held(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor(max_cores=2) as executor:
        wide = executor.submit(held, resource_dict=TWO)
        held.pids(2)
        small = executor.submit(add, 1, 2)
        assert not small.running()
        until(lambda: len(executor) == 1)
        held.open()
        assert wide.result(WAIT) == [None, None]
        assert small.result(WAIT) == 3


@pytest.mark.rows("fork", "jobs")
def test_large_values_of_ranks(make_executor: Callable[..., Any]) -> None:
    block = bytes(3_000_000)
    with make_executor(max_cores=2, resource_dict=TWO) as executor:
        assert executor.submit(identity, block).result(WAIT) == [block, block]


@pytest.mark.rows("fork")
def test_output_of_ranks_reaches_the_program(scripts: Any) -> None:
    out = scripts.run(
        """
        with Executor(max_cores=2) as executor:
            executor.submit(print, "from a rank", resource_dict={"cores": 2}).result(40)
        """,
    )
    assert out.count("from a rank") == 2


@pytest.mark.linux
@pytest.mark.rows("fork", "block-fork")
def test_worlds_leave_no_files(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Even if mpiexec was killed and could not tidy up. The user's directory for temporary files is left alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = scripts.start(
        """
        import pathlib, signal, time

        def kill_mpiexec(own):
            from mpi4py import MPI

            assert os.environ["TMPDIR"] == own
            # One rank only: once mpiexec is gone, the other's parent is the node agent.
            if MPI.COMM_WORLD.rank == 0:
                os.kill(mpiexec_above(os.getpid()), signal.SIGKILL)
            time.sleep(60)

        def mpiexec_above(pid):
            while True:
                name, _, rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")
                if name.partition("(")[2].startswith(("mpiexec", "prterun")):
                    return pid
                pid = int(rest.split()[1])

        options = {**OPTIONS, "max_cores": 2, "max_workers": 1, "resource_dict": {"cores": 2}}
        with Executor(**options) as executor:
            error = executor.submit(kill_mpiexec, os.environ["TMPDIR"]).exception(40)
            print(type(error).__name__)
        print(os.listdir(os.environ["TMPDIR"]))
        """,
        row.arguments(),
        env={"TMPDIR": str(folder)},
    )
    out, err = process.communicate(timeout=WAIT)
    assert out.splitlines() == ["ExecutorlibSocketError", "[]"], err


def ranks_noted(folder: Path) -> list[Path]:
    """Return the notes of the two ranks, once both have written theirs."""
    until(lambda: len([path for path in folder.iterdir() if path.name.count(".") == 2]) == 2, WAIT)
    return sorted(path for path in folder.iterdir() if path.name.count(".") == 2)


ENDS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "one raises and others wait": (raise_on, [[0], True]),
    "the other raises and one waits": (raise_on, [[1], True]),
    "one raises": (raise_on, [[1], False]),
    "all raise": (raise_on, [[0, 1], False]),
    "one dies": (die_on_a_rank, []),
    "run_time_max": (rest, []),
    "terminate_workers": (rest, []),
    "kill_workers": (rest, []),
}


@pytest.mark.linux
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.rows("fork", "block-fork")
def test_worlds_leave_no_shared_memory(make_executor: Callable[..., Any], tmp_path: Path, end: str) -> None:
    """Full of it, a machine starts no more worlds."""
    function, arguments = ENDS[end]
    needs = {**TWO, "run_time_max": 4} if end == "run_time_max" else TWO
    with make_executor(max_workers=1, max_cores=2, resource_dict=needs) as executor:
        future = executor.submit(function, str(tmp_path), *arguments)
        if end.endswith("_workers"):
            ranks_noted(tmp_path)
            getattr(executor, end)()
        assert future.exception(WAIT) is not None
    names = {name for path in ranks_noted(tmp_path) for name in path.read_text().split("\n")}
    assert names
    assert not [name for name in names if os.path.exists(f"/dev/shm/{name}")]


@pytest.mark.cache
@pytest.mark.rows("block-fork", "jobs")
def test_result_that_cannot_be_rebuilt_does_not_end_the_world(
    make_executor: Callable[..., Any], tmp_path: Path
) -> None:
    """It is kept as it was returned, and rebuilt only when somebody asks for it."""

    class Unbuildable:
        def __reduce__(self) -> Any:
            return int, ("cannot be built",)

    options: dict[str, Any] = {"cache_directory": str(tmp_path / "store"), "max_workers": None, "max_cores": 2}
    with make_executor(**options, resource_dict=TWO) as executor:
        error = executor.submit(Unbuildable).exception(WAIT)
        assert "cannot be built" in f"{error} {error.__cause__}"
        assert executor.submit(add, 1, 2).result(WAIT) == [3, 3]


@pytest.mark.rows("block-fork")
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_exception_that_is_returned_does_not_end_the_world(
    make_executor: Callable[..., Any], tmp_path: Path, ranks: list[int]
) -> None:
    with make_executor(max_workers=1, max_cores=2, resource_dict=TWO) as executor:
        for _ in range(2):
            error = executor.submit(raise_on, str(tmp_path), ranks, False).exception(WAIT)
            assert isinstance(error, CustomError)
            assert f"on rank {ranks[0]} of 2" in str(error.__cause__)
        assert executor.submit(add, 1, 2).result(WAIT) == [3, 3]
        # The same two processes in all calls.
        ranks_noted(tmp_path)


@pytest.mark.rows("fork")
def test_world_whose_ranks_raise_ends_in_order(scripts: Any) -> None:
    """No rank is killed, so no error text mentions that."""
    out = scripts.run(
        """
        def fail(value):
            raise KeyError(value)

        with Executor(max_cores=2, resource_dict={"cores": 2}) as executor:
            print(repr(executor.submit(fail, 7).exception(40)))
        """,
    )
    assert out == "KeyError(7)\n"


@pytest.mark.linux
@pytest.mark.rows("fork")
def test_ranks_end_when_agent_and_mpiexec_are_killed(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    before = children()
    with make_executor(max_cores=2, resource_dict=TWO) as executor:
        future = executor.submit(rest, str(tmp_path))
        ranks, parents = zip(*(path.name.split(".")[1:] for path in ranks_noted(tmp_path)), strict=True)
        for pid in {*(children() - before), *map(int, parents)}:
            os.kill(pid, signal.SIGKILL)
        assert future.exception(WAIT) is not None
        wait_until_gone(*map(int, ranks))


@pytest.mark.rows("fork")
def test_mpiexec_that_does_not_answer_is_asked_once(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def wait_in_vain(argv: list[str], timeout: float, **_: Any) -> None:
        asked.append(argv)
        raise subprocess.TimeoutExpired(argv, timeout)

    mpi._ask.cache_clear()
    monkeypatch.setattr(subprocess, "run", wait_in_vain)
    try:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="--version"):
                mpi.find_mpiexec()
    finally:
        mpi._ask.cache_clear()
    assert len(asked) == 1
