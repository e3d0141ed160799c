"""Every way for a job to die, on a real Slurm: the call's future says what happened, and nothing is left behind.

The table's jobs run all at once, in a fixture; each test looks at what became of one of them. The cluster is one of the
tests' own, because its nodes and its controller die as well: with cgroups and without `sacct`, and the reverse.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dying import (
    CALM,
    LAST_WORDS,
    StrikesWhenPickled,
    StrikesWhenUnpickled,
    identity,
    large,
    put,
    strike,
    strike_in_rank_1,
)

from conftest import MARK, missing_for_mpi
from contract.functions import lines, until, wait_for
from executorlib import SlurmClusterExecutor
from executorlib.api import ExecutorlibSocketError

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),  # what is waited for takes a tenth of it, but on a machine that is busy otherwise
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster of its own needs root"),
]

WAIT = 200.0
# From Slurm's knowledge of a job's end to the error, in seconds: 15, and what a busy machine adds.
SOON = 45.0
# Until processes have started, or ended.
SETTLED = 90.0


class Cluster:
    """A Slurm cluster of two nodes beside the one that other tests use.

    Args:
        settings: Of ``tests/slurm/cluster``.
    """

    def __init__(self, settings: dict[str, str]) -> None:
        self.accounting = settings["ACCOUNTING"] == "1"
        self.directory = Path("/var/lib/executorlib-slurm-faults")
        port = int(os.environ.get("SLURM_CLUSTER_PORT", "17000")) + 600
        own = {"DIR": str(self.directory), "PORT": str(port), "NODES": "2", **settings}
        # Daemons are not children of the tests: they carry no mark of theirs.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", MARK.split("=")[0]))}
        self._environment = {**kept, **{f"SLURM_CLUSTER_{key}": value for key, value in own.items()}}

    def command(self, what: str) -> None:
        script = str(Path(__file__).with_name("cluster"))
        done = subprocess.run([script, what], env=self._environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def kill(self, daemon: str, signal_number: int) -> None:
        """Send a daemon a signal; one that has ended is an `OSError`, whoever has its process id now."""
        pid = int((self.directory / "run" / f"{daemon}.pid").read_text().split()[0])
        if not Path(f"/proc/{pid}/comm").read_text().startswith(daemon.partition("-")[0]):
            raise ProcessLookupError(f"{daemon} does not run")
        os.kill(pid, signal_number)

    def set(self, **settings: object) -> None:
        """Change lines of the configuration until the next ``up``."""
        path = self.directory / "etc" / "slurm.conf"
        text = path.read_text()
        for key, value in settings.items():
            text = re.sub(f"^{key}=.*", f"{key}={value}", text, flags=re.MULTILINE)
        path.write_text(text)
        slurm("scontrol", "reconfigure")


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


CLUSTERS = {
    "cgroups": {"CGROUPS": "auto", "ACCOUNTING": "0"},
    "sacct": {"CGROUPS": "0", "ACCOUNTING": "1"},
}


@pytest.fixture(scope="module", params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        made = Cluster(CLUSTERS[request.param])
        patch.setenv("SLURM_CONF", str(made.directory / "etc" / "slurm.conf"))
        try:
            made.command("up")
            # An account that this partition does not take; without sacctmgr's there are no others that are refused.
            slurm("scontrol", "update", "PartitionName=short", "AllowAccounts=physics")
            yield made
        finally:
            made.command("down")


def no_jobs() -> bool:
    return not slurm("squeue", "--noheader")


def job_id(name: str) -> str:
    """The id of the job of this name, once there is one."""
    until(lambda: slurm("squeue", "--noheader", f"--name={name}"), SETTLED)
    return slurm("squeue", "--noheader", f"--name={name}", "--format=%A")


def end_of(job: str) -> float:
    """When Slurm had a job end."""
    found = re.search(r" EndTime=(\S+)", slurm("scontrol", "show", "job", job))
    assert found is not None
    return datetime.datetime.fromisoformat(found[1]).timestamp()


def end_by_time_limit(name: str) -> None:
    # Limits are whole minutes, but the end can be moved, though not into the past. Slurm looks at it every 30 seconds.
    soon = datetime.datetime.now() + datetime.timedelta(seconds=10)
    slurm("scontrol", "update", f"JobId={job_id(name)}", f"EndTime={soon.isoformat(timespec='seconds')}")


# The table.


@dataclass(frozen=True)
class Fault:
    """A way for a call to end without a result.

    Attributes:
        call: The function and its arguments, given a folder.
        text: What the error has to say.
        resources: Of the call.
        error: What the error is.
        tail: What the error shows of the job's output.
        act: What brings the fault about, given the job's name, once it has started, or where `queued`, is queued.
        again: The resources with which it succeeds when it is submitted again.
        result: What it returns then.
    """

    call: Callable[[str], tuple[Any, ...]]
    text: str
    resources: dict[str, Any] = field(default_factory=dict)
    error: type[BaseException] = BrokenExecutor
    tail: str = LAST_WORDS
    act: Callable[[str], object] | None = None
    queued: bool = False
    again: dict[str, Any] = field(default_factory=dict)
    result: Any = CALM


def dies(way: str, text: str, **more: Any) -> Fault:
    return Fault(lambda folder: (strike, way, folder), text, **more)


def refused(text: str, **resources: Any) -> Fault:
    """A call that does not become a job, or one that never starts."""
    return Fault(lambda folder: (identity, text), text, resources, tail="", result=text)


HEAD = "#!/bin/bash\n#SBATCH --ntasks={{ cores }}\n"
LATER = ["--begin=now+1hour"]
TABLE = {
    # The interpreter, at each stage.
    "unpickling": Fault(
        lambda folder: (identity, StrikesWhenUnpickled("SIGKILL", folder)), r"FAILED .*exit code 137:0 .*SIGKILL.*node"
    ),
    "running": dies("SIGKILL", r"FAILED .*exit code 137:0 .*SIGKILL.*, node node\d"),
    "pickling": Fault(lambda folder: (StrikesWhenPickled, "SIGKILL", folder), r"FAILED .*exit code 137:0"),
    "writing": dies("killed at the rename", r"FAILED .*exit code 137:0"),
    "half a result": dies("half a result", r"COMPLETED .*exit code 0:0"),
    # The function.
    "os._exit": dies("os._exit", r"FAILED .*exit code 7:0"),
    "os._exit(0)": dies("os._exit(0)", r"FAILED .*exit code 70:0.*os\._exit\(0\)"),
    "os._exit(3)": dies("os._exit(3)", r"FAILED .*exit code 3:0"),
    "sys.exit": dies("sys.exit", "7", error=ExecutorlibSocketError, tail=""),
    "segfault": dies("segfault", r"FAILED .*exit code 139:0 .*SIGSEGV"),
    "rank": Fault(
        lambda folder: (strike_in_rank_1, "SIGKILL", folder),
        "FAILED",
        {"cores": 2},
        again={"cores": 2},
        result=[CALM] * 2,
    ),
    # Limits.
    "memory": dies(
        "out of memory",
        "(OUT_OF_MEMORY|FAILED).*memory_max.*(slurmstepd|oom_kill event|memory limit)",
        resources={"memory_max": 0.2},
    ),
    "run_time_max": dies("sleep", "run_time_max of 2 s", resources={"run_time_max": 2}, error=TimeoutError),
    "time limit": dies("long sleep", "TIMEOUT.*run_time_max", act=end_by_time_limit),
    # Somebody.
    "scancel": dies("other sleep", r"CANCELLED", act=lambda name: slurm("scancel", f"--name={name}")),
    "scancel queued": Fault(
        lambda folder: (identity, "queued"),
        "CANCELLED",
        {"slurm_cmd_args": LATER},
        tail="",
        act=lambda name: slurm("scancel", f"--name={name}"),
        queued=True,
        result="queued",
    ),
    # The submission.
    "partition": refused(r"sbatch.*[Ii]nvalid partition", partition="nonsense"),
    "account": refused("PENDING.*account not ", partition="short", account="nonsense"),
    "cores": refused("PENDING.*PartitionConfig|sbatch.*not available", cores=99),  # the latter is 24.11's
    "much memory": refused("sbatch.*Memory specification", memory_max=999),
    "gpus": refused("sbatch.*not available", gpus_per_core=9),
    "long": refused("PENDING.*PartitionTimeLimit", partition="short", run_time_max=86400, account="physics"),
    "no script": refused("sbatch.*batch script", submission_template="hostname\n"),
    "no template": refused("is not a valid Jinja template", submission_template="{% if"),
    # The script.
    "no Python": dies(
        "calm",
        r"FAILED .*exit code 127:0",
        resources={"submission_template": HEAD + "/no/such/{{ command }}\n"},
        tail="No such file",
    ),
    "no shell": dies(
        "calm too",
        r"FAILED .*node node\d",
        resources={"submission_template": "#!/no/such/shell\n{{ command }}\n"},
        tail="No such file",
    ),
}


@contextlib.contextmanager
def none_left(executor: SlurmClusterExecutor) -> Iterator[None]:
    """Cancel all calls where the test fails meanwhile: some would wait for an hour."""
    try:
        yield
    except BaseException:
        executor.kill_workers()
        raise


@dataclass
class Outcome:
    """The outcome of a call: its error, the time until then, and the outcome of the same call, submitted again."""

    error: BaseException | None
    seconds: float
    of_dependent: BaseException | None
    again: Any


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Return the outcomes of all calls of the table."""
    folder = tmp_path_factory.mktemp("table")
    faults = dict(TABLE)
    if missing_for_mpi():
        del faults["rank"]
    if cluster.accounting:
        del faults["time limit"]  # it takes half a minute, once is enough
    if " 22." not in slurm("sinfo", "--version"):
        del faults["account"]  # newer ones than 22.05 look at accounts only where AccountingStorageEnforce says so
    done_at: dict[str, float] = {}
    futures: dict[str, Future[Any]] = {}
    dependents: dict[str, Future[Any]] = {}
    raised: dict[str, Exception] = {}
    submitted_at = time.time()
    with SlurmClusterExecutor(cache_directory=folder / "cache") as executor, none_left(executor):
        for name, fault in faults.items():
            named = {"job_name": f"test-{name.replace(' ', '-')}"} if fault.act else {}
            future = executor.submit(*fault.call(str(folder)), resource_dict={**fault.resources, **named})
            future.add_done_callback(lambda _, name=name: done_at.setdefault(name, time.time()))
            futures[name], dependents[name] = future, executor.submit(identity, future)
        for name, fault in faults.items():
            if fault.act is not None:
                try:
                    if not fault.queued:
                        wait_for(folder / f"{fault.call('')[1]} started", SETTLED)
                    fault.act(f"test-{name.replace(' ', '-')}")
                except Exception as error:
                    raised[name] = error
        assert not raised
        pending = wait([*futures.values(), *dependents.values()], WAIT).not_done
        late = [name for name in faults if futures[name] in pending or dependents[name] in pending]
        assert not late, slurm("squeue")
        errors = {name: future.exception() for name, future in futures.items()}
        of_dependents = {name: future.exception() for name, future in dependents.items()}
        assert executor.submit(identity, "unharmed").result(WAIT) == "unharmed"
    until(no_jobs, SETTLED)
    put(str(folder / "calm"))
    with SlurmClusterExecutor(cache_directory=folder / "cache") as executor, none_left(executor):
        second = {
            name: executor.submit(*fault.call(str(folder)), resource_dict=fault.again) for name, fault in faults.items()
        }
        again = {name: future.exception(WAIT) or future.result() for name, future in second.items()}
    until(no_jobs, SETTLED)
    assert not list((folder / "cache").glob("*_i.h5"))
    known_at = dict.fromkeys(faults, submitted_at)
    for name, error in errors.items():
        job = re.search(r"job (\d+(_\d+)?) ended", str(error))
        if job is not None:
            known_at[name] = end_of(job[1])
    return {
        name: Outcome(errors[name], done_at[name] - known_at[name], of_dependents[name], again[name]) for name in faults
    }


@pytest.mark.parametrize("name", TABLE)
def test_fault(name: str, outcomes: dict[str, Outcome]) -> None:
    if name not in outcomes:
        pytest.skip("not on this cluster, or needs mpiexec and mpi4py")
    fault, outcome = TABLE[name], outcomes[name]
    print(f"{outcome.seconds:.1f} s: {outcome.error!r}")  # noqa: T201  # shown by pytest -rP
    assert isinstance(outcome.error, fault.error)
    text = str(outcome.error)
    assert re.search(fault.text, text, re.DOTALL), text
    assert fault.tail in text
    assert len(text) < 2000
    assert outcome.seconds < SOON, text
    if name == "half a result":
        # Its job started, because the other succeeded; which of the two is known to have failed first is open.
        assert isinstance(outcome.of_dependent, (FileNotFoundError, ExecutorlibSocketError))
    else:
        assert outcome.of_dependent is outcome.error
    if name == "sys.exit":
        assert "the function called sys.exit(7)" in str(outcome.again)  # the function raised it, so it is kept
    else:
        assert outcome.again == fault.result


# One at a time. Nothing of these depends on cgroups or accounting.

one_cluster = pytest.mark.parametrize("cluster", ["cgroups"], indirect=True)


@pytest.fixture
def executor(cluster: Cluster, tmp_path: Path) -> Iterator[SlurmClusterExecutor]:
    with SlurmClusterExecutor(cache_directory=tmp_path / "cache") as made:
        yield made
        made.shutdown(cancel_futures=True)
    put(str(tmp_path / "calm"))
    until(no_jobs, SETTLED)


def started(folder: Path, way: str) -> None:
    wait_for(folder / f"{way} started", SETTLED)


def error_of(future: Future[Any], limit: float = SOON) -> str:
    """The text of a call's error, which comes soon."""
    error = future.exception(limit)
    assert isinstance(error, BrokenExecutor), future
    return str(error)


ON_NODE_2 = {"slurm_cmd_args": ["--nodelist=node2"]}


@one_cluster
def test_node_down(executor: Any, tmp_path: Path) -> None:
    future = executor.submit(strike, "sleep", str(tmp_path), resource_dict=ON_NODE_2)
    dependent = executor.submit(identity, future)
    started(tmp_path, "sleep")
    slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        text = error_of(future)
        assert "NODE_FAIL" in text
        assert "node node2" in text
        assert "SIGHUP" not in text  # the exit code that newer ones make up would be that
        assert LAST_WORDS in text
        assert dependent.exception(1.0) is future.exception()
    finally:
        # It may be up again by itself: its daemon lives.
        subprocess.run(["scontrol", "update", "NodeName=node2", "State=RESUME"], capture_output=True, timeout=30)
    put(str(tmp_path / "calm"))
    assert executor.submit(strike, "sleep", str(tmp_path)).result(SOON) == CALM


@one_cluster
def test_a_job_that_an_administrator_holds(executor: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The job waits, and starts when it is released."""
    future = executor.submit(identity, 5, resource_dict={"slurm_cmd_args": LATER, "job_name": "test-held"})
    job = job_id("test-held")
    slurm("scontrol", "hold", job)
    until(lambda: f"an administrator holds its job {job} (JobHeldAdmin)" in caplog.text, SOON)
    assert not future.done()
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    slurm("scontrol", "release", job)
    assert future.result(SOON) == 5


@one_cluster
def test_node_that_does_not_answer(cluster: Cluster, executor: Any, tmp_path: Path) -> None:
    future = executor.submit(strike, "sleep", str(tmp_path), resource_dict=ON_NODE_2)
    started(tmp_path, "sleep")
    cluster.set(SlurmdTimeout=5)

    def is_over() -> bool:
        with contextlib.suppress(OSError):  # newer ones start themselves anew for their settings, with another id
            cluster.kill("slurmd-node2", signal.SIGKILL)
        return future.done()

    try:
        until(is_over, SETTLED)
        assert re.search("NODE_FAIL.*node node2", error_of(future))
    finally:
        cluster.command("up")


@one_cluster
@pytest.mark.parametrize("end", ["stopped", "ended"])
def test_controller_is_away(cluster: Cluster, executor: Any, tmp_path: Path, end: str) -> None:
    """Nothing is lost: running jobs go on, and submissions are repeated later, but succeed only once."""
    running = executor.submit(strike, "short sleep", str(tmp_path))
    started(tmp_path, "short sleep")
    cluster.kill("slurmctld", signal.SIGSTOP if end == "stopped" else signal.SIGTERM)
    try:
        late = executor.submit(strike, "os._exit", str(tmp_path))
        assert running.result(SOON) == CALM
        if end == "stopped":
            # Longer than sbatch waits for the answer, after which the controller takes the job all the same.
            time.sleep(12.0)
    finally:
        if end == "stopped":
            cluster.kill("slurmctld", signal.SIGCONT)
        else:
            cluster.command("up")
    assert "exit code 7:0" in error_of(late, SETTLED)
    assert len(lines(tmp_path / "os._exit started")) == 1
    until(no_jobs, SETTLED)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, timeout=10)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


@one_cluster
def test_full_disk(executor: Any, small_disk: Path, tmp_path: Path) -> None:
    there = {"cache_directory": str(small_disk)}
    result = executor.submit(large, str(tmp_path), resource_dict=there)
    argument = executor.submit(len, os.urandom(3 << 20), resource_dict=there)
    text = error_of(argument)
    assert "No space left on device" in text
    assert str(small_disk) in text
    assert "No space left on device" in error_of(result)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    assert "No space left on device" in error_of(executor.submit(identity, 1, resource_dict=there))
    filler.unlink()
    put(str(tmp_path / "calm"))
    assert executor.submit(large, str(tmp_path), resource_dict=there).result(SOON) == b""
    assert executor.submit(identity, 1, resource_dict=there).result(SOON) == 1


@one_cluster
def test_damaged_files(executor: Any, tmp_path: Path) -> None:
    """A damaged result is replaced. A damaged call is claimed again, or is an error if a job was to run it."""
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    damages = {"empty": b"", "garbage": b"garbage", "half": b"\x89HDF\r\n\x1a\n" + bytes(50)}
    futures = {}
    for name, content in damages.items():
        for suffix in "io":
            path = cache / f"{name}-{suffix}_{suffix}.h5"
            path.write_bytes(content)
            os.utime(path, (1, 1))  # whoever was writing it has gone
            futures[path.name] = executor.submit(identity, name, resource_dict={"cache_key": f"{name}-{suffix}"})
    queued = {"slurm_cmd_args": ["--begin=now+1hour"], "job_name": "test-damaged", "cache_key": "queued"}
    struck = executor.submit(identity, 5, resource_dict=queued)
    dependent = executor.submit(identity, struck)
    job = job_id("test-damaged")
    os.truncate(cache / "queued_i.h5", 100)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert [future.result(SOON) for future in futures.values()] == [name for name in damages for _ in "io"]
    text = error_of(struck)
    assert "FAILED" in text
    assert str(cache / "queued_i.h5") in text
    assert dependent.exception(1.0) is struck.exception()
    assert executor.submit(identity, 5, resource_dict={"cache_key": "queued"}).result(SOON) == 5


@one_cluster
def test_cache_directory_is_removed(executor: Any, tmp_path: Path) -> None:
    """A running job makes it again for its result; a waiting job can no longer find its call."""
    running = executor.submit(strike, "short sleep", str(tmp_path))
    queued = executor.submit(identity, 5, resource_dict={"slurm_cmd_args": LATER, "job_name": "test-removed"})
    job = job_id("test-removed")
    started(tmp_path, "short sleep")
    shutil.rmtree(tmp_path / "cache")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert running.result(SOON) == CALM
    assert "FAILED" in error_of(queued)
    assert executor.submit(identity, 5).result(SOON) == 5


@one_cluster
def test_result_that_shows_late(executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm says that the job succeeded, but a slow file system does not show its result yet."""
    monkeypatch.setattr("executorlib.machine.is_local_disk", lambda folder: False)
    future = executor.submit(strike, "result is late", str(tmp_path), resource_dict={"cache_key": "late"})
    late = tmp_path / "cache" / "late_o.h5.late"
    until(late.exists, SETTLED)
    until(no_jobs, SETTLED)
    arrives = threading.Timer(6.0, lambda: late.rename(tmp_path / "cache" / "late_o.h5"))
    arrives.start()
    assert future.result(SOON) == CALM
    arrives.join()
