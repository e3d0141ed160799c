"""The guards around the tests work: runs of pytest in which a test goes wrong show it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract.functions import until

TESTS = Path(__file__).parent
WAIT = 50

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start pytest, with the guards of these tests, on a module of the given source."""
    started: list[subprocess.Popen[str]] = []

    def run(source: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        module = tmp_path / "test_inner.py"
        module.write_text("import os, time\nfrom pathlib import Path\nimport pytest\n" + textwrap.dedent(source))
        options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml")]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", *arguments, str(module)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(TESTS), **env},
                start_new_session=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("scope", ["function", "module"])
def test_teardown_that_hangs_after_a_failure_ends_the_run(start: Start, scope: str) -> None:
    source = f"""
    @pytest.fixture(scope={scope!r})
    def hanging():
        yield
        while True:
            time.sleep(1)

    @pytest.mark.timeout(1)
    def test_that_fails(hanging):
        assert False
    """
    process = start(source)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert "Timeout (0:00:0" in out
    assert "in hanging" in out  # where it hung


INTERRUPTED = """
def test_that_fails():
    assert "this" == "that"

@pytest.fixture
def failing():
    yield
    raise RuntimeError("a teardown of its own")

def test_that_is_interrupted(failing, scripts, tmp_path):
    from executorlib.api import TestClusterExecutor
    executor = TestClusterExecutor(max_workers=1, cache_directory=str(tmp_path / "cache"))
    future = executor.submit(hold, str(tmp_path / "job"))
    program = scripts.start("import subprocess; subprocess.run(['sleep', '1000'])")
    while not (tmp_path / "job").exists():
        time.sleep(0.01)
    Path("pids").write_text(f"{os.getpid()} {program.pid}")
    future.result()

def hold(path):
    Path(path).touch()
    time.sleep(1000)
"""


def marked(pid: int) -> list[int]:
    """The processes that descend from a run of pytest."""
    mark = f"EXECUTORLIB_TEST_RUN={pid}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.linux
@pytest.mark.cache
@pytest.mark.parametrize("arguments", [[], ["-n", "1"]], ids=["alone", "in parallel"])
def test_interrupt_keeps_the_summary_and_leaves_nothing(start: Start, tmp_path: Path, arguments: list[str]) -> None:
    process = start(INTERRUPTED, *arguments)
    pids = tmp_path / "pids"
    until(lambda: pids.exists() and pids.read_text(), WAIT)
    run = int(pids.read_text().split()[0])
    assert len(marked(run)) > 2
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 2
    assert "FAILED test_inner.py::test_that_fails - AssertionError" in out
    assert "KeyboardInterrupt" in out
    assert "a teardown of its own" in out or arguments  # a process of pytest-xdist prints nothing
    assert marked(run) == []


@pytest.mark.parametrize(
    ("marker", "program", "variable"),
    [("slurm", "sinfo", "EXECUTORLIB_TEST_SLURM"), ("gridengine", "qstat", "EXECUTORLIB_TEST_GRIDENGINE")],
)
@pytest.mark.parametrize("told", [False, True])
def test_tests_use_a_queue_only_if_told_to(
    start: Start, tmp_path: Path, marker: str, program: str, variable: str, told: bool
) -> None:
    pytest.importorskip("defusedxml")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (program, "qacct"):
        (folder / name).write_text(f"#!/bin/sh\necho '</job_info>'\ntouch {tmp_path}/asked\n")
        (folder / name).chmod(0o755)
    source = f"""
    @pytest.mark.{marker}
    def test_on_the_queue():
        Path({str(tmp_path)!r}, "used").touch()
    """
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    process = start(source, PATH=path, **{variable: "1" if told else ""})
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert (tmp_path / "asked").exists() is told
    assert (tmp_path / "used").exists() is told
    if not told:
        assert f"make test-{marker}" in out


def test_log_records_of_tests_reach_the_summary(start: Start) -> None:
    """In parallel, too: pytest-xdist cannot send half characters."""
    process = start(
        "def test_it():\n    import logging\n    logging.error('all of \\udcff it')\n    assert 0", "-n", "1"
    )
    out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert "all of \\udcff it" in out


def test_process_that_dies_ends_a_run_in_parallel(start: Start) -> None:
    """pytest-xdist would start another process, and run the deadly test again."""
    source = """
    @pytest.mark.parametrize("number", range(6))
    def test_that_dies(number):
        os._exit(1)
    """
    out, _ = start(source, "-n3").communicate(timeout=WAIT)
    assert "crashed while running 'test_inner.py::test_that_dies[0]'" in out
    assert "1 failed" in out
