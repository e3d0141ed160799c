"""Missing or full surroundings of an executor are errors of the call, at once, with a remedy."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import LINUX, find_mpiexec

WAIT = 40
pytestmark = pytest.mark.rows(single_node=True)

# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not LINUX or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


FULL = """
    import random

    def large(seed):
        return random.Random(seed).randbytes(1_000_000)

    folder = os.environ["FOLDER"]
    with Executor(cache_directory=folder, **OPTIONS) as executor:
        for seed in range(2):
            future = executor.submit(large, seed)
            error = future.exception(30)
            print(type(error).__name__ if error else future.result() == large(seed))
    # The files are whole or absent: nobody gets half a result.
    with Executor(cache_directory=folder, **OPTIONS) as executor:
        future = executor.submit(large, 0)
        error = future.exception(30)
        print(type(error).__name__ if error else future.result() == large(0))
    with Executor(**OPTIONS) as executor:
        print(executor.submit(abs, -1).result(20))
"""


def check_full(out: str) -> None:
    *first, last = out.split()
    assert len(first) == 3
    # Either the result, not kept, or the system's error; never a wrong or missing answer.
    assert set(first) <= {"True", "OSError"}
    assert last == "1"


def quietly(scripts: Any, *args: Any, **kwargs: Any) -> str:
    """Run a script that may log to standard error."""
    process = scripts.start(*args, **kwargs)
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err
    return str(out)


@pytest.mark.cache
def test_full_disk_under_the_cache(row: Any, scripts: Any, small_disk: Path) -> None:
    out = quietly(scripts, FULL, row.arguments(), env={"FOLDER": str(small_disk)})
    check_full(out)
    assert not [path for path in small_disk.rglob("*_o.h5") if path.stat().st_size < 1000]


@pytest.mark.cache
def test_file_size_limit_under_the_cache(row: Any, scripts: Any, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    env = {"FOLDER": str(tmp_path / "store")}
    check_full(quietly(scripts, FULL, row.arguments(), env=env, preexec_fn=limit))


def test_file_size_limit_and_large_values(row: Any, scripts: Any) -> None:
    """A limit on files (``ulimit -f``) does not limit arguments and results."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    out = quietly(
        scripts,
        """
        def double(data):
            return data + data

        data = bytes(3_000_000)
        with Executor(**OPTIONS) as executor:
            print(executor.submit(len, data).result(20))
            print(executor.submit(double, data).result(20) == data + data)
        """,
        row.arguments(),
        preexec_fn=limit,
    )
    assert out.split() == ["3000000", "True"]


@pytest.mark.cache
def test_damaged_file_in_the_cache(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Damage on disk is never a result: the call runs again, or the error names the file."""
    out = quietly(
        scripts,
        """
        from pathlib import Path

        def seven():
            return 7

        with Executor(cache_directory="store", **OPTIONS) as executor:
            print(executor.submit(seven).result(20))
        (path,) = Path("store").glob("*_o.h5")
        for damage in (b"", b"garbage", path.read_bytes()[:-200]):
            path.write_bytes(damage)
            with Executor(cache_directory="store", **OPTIONS) as executor:
                future = executor.submit(seven)
                error = future.exception(20)
                print(path.name in str(error) if error else future.result())
            path.unlink(missing_ok=True)
            with Executor(cache_directory="store", **OPTIONS) as executor:
                executor.submit(seven).result(20)
        """,
        row.arguments(),
    )
    assert out.split()[0] == "7"
    assert set(out.split()) <= {"7", "True"}


@pytest.mark.cache
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written(row: Any, scripts: Any, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    check_full(quietly(scripts, FULL, row.arguments(), env={"FOLDER": str(tmp_path / "store")}))


# Settings that a session inherits from the process that started it.


SIGNALS = """
    import signal

    def signals():
        chld = signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        return len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), chld

    if STATE == "blocked":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    else:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with Executor(**OPTIONS) as executor:
        print(executor.submit(signals, resource_dict=NEEDS).result(40))
        print(type(executor.submit(os._exit, 3, resource_dict=NEEDS).exception(40)).__name__)
        executor.submit(sys.stderr.write, "to be ended", resource_dict=NEEDS)
"""


@pytest.mark.parametrize("state", ["blocked", "ignored"])
@pytest.mark.rows("fork", "spawn", "block-fork", "block-spawn", "jobs")
def test_signals_that_the_session_does_not_get(row: Any, scripts: Any, state: str) -> None:
    """Workers get them anyway, and deaths are noticed."""
    source = f"NEEDS, STATE = {{}}, {state!r}\n{textwrap.dedent(SIGNALS)}"
    out = quietly(scripts, source, {**row.arguments(), **({"restart_limit": 1} if row.block else {})})
    assert out.splitlines() == ["(0, True)", "ExecutorlibSocketError"]


@pytest.mark.mpi
def test_signals_that_a_session_with_ranks_does_not_get(scripts: Any) -> None:
    source = f"NEEDS, STATE = {{'cores': 2}}, 'blocked'\n{textwrap.dedent(SIGNALS)}"
    out = quietly(scripts, source, {"max_cores": 2})
    assert out.splitlines() == ["[(0, True), (0, True)]", "ExecutorlibSocketError"]


@pytest.mark.linux
def test_standard_streams_that_are_closed(row: Any, scripts: Any) -> None:
    """Their numbers go to the next files that the user opens, which must not receive the output of workers."""
    out = scripts.run(
        """
        from pathlib import Path

        def noisy():
            for number in (1, 2):
                os.write(number, b"from the worker")
            return os.read(0, 1)

        streams = [os.dup(number) for number in range(3)]
        files = []
        for number in range(3):
            os.close(number)
        for number in range(3):
            files.append(open(f"data{number}", "wb", buffering=0))
            assert files[-1].fileno() == number
            files[-1].write(b"begin ")
        with Executor(**OPTIONS) as executor:
            answers = [executor.submit(noisy).result(30) for _ in range(3)]
        for file in files:
            file.write(b"end")
            file.close()
        with Executor(**OPTIONS) as executor:  # nothing at all has these numbers now
            answers += [executor.submit(noisy).result(30) for _ in range(3)]
            targets = {os.readlink(f"/proc/self/fd/{number}") for number in range(3)}
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        print(answers == [b""] * 6, targets)
        print({Path(file.name).read_bytes() for file in files})
        """,
        row.arguments(),
    )
    assert out.splitlines() == ["True {'/dev/null'}", "{b'begin end'}"]


def test_standard_streams_that_were_never_open(row: Any, scripts: Any, tmp_path: Path) -> None:
    def close() -> None:
        for number in range(3):
            os.close(number)

    process = scripts.start(
        """
        def noisy():
            os.write(1, b"out")
            os.write(2, b"err")
            return 7

        with open("data", "wb", buffering=0) as file, Executor(**OPTIONS) as executor:
            assert file.fileno() == 0
            other = open("other", "wb", buffering=0)
            result = executor.submit(noisy).result(30)
            other.write(str(result).encode())
            other.close()
        """,
        row.arguments(),
        preexec_fn=close,
    )
    assert process.wait(WAIT) == 0
    assert (tmp_path / "data").read_bytes() == b""
    assert (tmp_path / "other").read_bytes() == b"7"


# Without MPI.


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own, without mpiexec beside it and without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    return folder / "bin" / "python"


def packages(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which only these packages can be imported, and no program is found."""
    folder.mkdir()
    for name in names:
        spec = find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        found = Path(spec.origin)
        source = found.parent if found.name == "__init__.py" else found
        (folder / source.name).symlink_to(source)
        for libraries in source.parent.glob(f"{name}.libs"):
            (folder / libraries.name).symlink_to(libraries)
        if name == "zmq":
            for libraries in source.parent.glob("pyzmq.libs"):
                (folder / libraries.name).symlink_to(libraries)
    # The test's own modules must not bring the outer Python's packages along.
    return {"PYTHONPATH": str(folder), "PATH": str(folder / "empty")}


RANKS = """
    import time
    started = time.monotonic()
    with Executor(max_cores=2, **OPTIONS) as executor:
        error = executor.submit(abs, -1, resource_dict={"cores": 2}).exception(30)
        print(type(error).__name__, "|", error)
        assert time.monotonic() - started < 15
        print(executor.submit(abs, -1).result(20))
"""


@pytest.mark.mpi
@pytest.mark.rows("fork", "spawn")
def test_mpiexec_is_missing(row: Any, scripts: Any, bare_python: Path, tmp_path: Path) -> None:
    env = packages(tmp_path / "packages", "executorlib", "cloudpickle", "zmq", "mpi4py")
    options = {"start_method": row.start}
    out = quietly(scripts, RANKS, options, python=str(bare_python), env=env)
    text, last = out.rsplit("\n", 2)[:2]
    assert "mpiexec" in text
    assert "install" in text
    assert last == "1"


@pytest.mark.mpi
@pytest.mark.rows("fork", "spawn")
def test_mpi4py_is_missing(row: Any, scripts: Any, bare_python: Path, tmp_path: Path) -> None:
    env = packages(tmp_path / "packages", "executorlib", "cloudpickle", "zmq")
    mpiexec = find_mpiexec()
    assert mpiexec is not None
    env["PATH"] = f"{Path(mpiexec).parent}{os.pathsep}{os.environ['PATH']}"
    options = {"start_method": row.start}
    out = quietly(scripts, RANKS, options, python=str(bare_python), env=env)
    text, last = out.rsplit("\n", 2)[:2]
    assert "mpi4py" in text
    assert "install" in text
    assert last == "1"


def test_nothing_on_the_path(row: Any, scripts: Any) -> None:
    """Plain calls need no program."""
    out = scripts.run(
        "with Executor(**OPTIONS) as e:\n    print(e.submit(abs, -1).result(20))\n",
        row.arguments(),
        env={"PATH": ""},
    )
    assert out == "1\n"


@pytest.mark.linux
def test_too_few_file_descriptors(row: Any, scripts: Any) -> None:
    """Many calls work under a low limit. If they cannot, the result is an error, not a hang."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    out = quietly(
        scripts,
        """
        with Executor(**OPTIONS) as executor:
            futures = [executor.submit(abs, -i) for i in range(60)]
            errors = [future.exception(30) for future in futures]
        good = [i for i, error in enumerate(errors) if error is None]
        assert all(futures[i].result() == i for i in good)
        print(len(good) == 60 or sorted({type(error).__name__ for error in errors if error}))
        """,
        row.arguments(),
        preexec_fn=limit,
    )
    assert out.strip() == "True"


@pytest.mark.linux
def test_no_file_descriptor_is_left(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Only the call that needed one fails. Running calls go on, and later ones work once there are some again."""
    out = quietly(
        scripts,
        """
        import resource, time
        from concurrent.futures import BrokenExecutor
        from pathlib import Path

        def hold():
            while not Path("go").exists():
                time.sleep(0.005)
            return "held"

        with Executor(**OPTIONS) as executor:
            held = executor.submit(hold)
            print(executor.submit(len, "two").result(20))
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            for size in (1, 1, 1, 3_000_000):
                future = executor.submit(bytes, size)
                error = future.exception(20)
                if error is None:
                    assert future.result() == bytes(size)
                else:
                    assert isinstance(error, (OSError, BrokenExecutor)), error
                    assert "open files" in str(error), error
            print(error is not None)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            Path("go").touch()
            print(held.result(20))
            print(executor.submit(bytes, 3_000_000).result(20) == bytes(3_000_000))
        """,
        row.arguments(),
    )
    assert out.split() == ["3", "True", "held", "True"]


@pytest.mark.linux
def test_more_workers_than_open_files(row: Any, scripts: Any) -> None:
    """The soft limit is raised as far as needed; beyond the hard limit the constructor raises an error."""
    out = scripts.run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 700))
        Executor(**{**OPTIONS, "max_workers": 2}).shutdown()
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64)
        for size in (1000, 100_000):
            try:
                Executor(**{**OPTIONS, "max_workers": size}).shutdown()
            except ValueError as error:
                print("max_workers" in str(error) and "ulimit" in str(error))
        with Executor(**{**OPTIONS, "max_workers": 2}) as executor:
            if OPTIONS.get("block_allocation"):
                try:
                    executor.max_workers = 1000
                except ValueError as error:
                    print("open files" in str(error))
            print(executor.submit(abs, -1).result(20))
        """,
        row.arguments(),
    )
    assert out.split() == ["True"] * (4 if row.block else 3) + ["1"]


def test_temporary_directory_that_is_not_there(row: Any, scripts: Any) -> None:
    out = scripts.run(
        "with Executor(**OPTIONS) as e:\n    print(e.submit(abs, -1).result(20))\n",
        row.arguments(),
        env={"TMPDIR": "/no/such/folder"},
    )
    assert out == "1\n"


def test_long_temporary_directory(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Longer than the address of a Unix socket may be."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    out = scripts.run(
        "with Executor(**OPTIONS) as e:\n    print(e.submit(abs, -1).result(20))\n",
        row.arguments(),
        env={"TMPDIR": str(folder)},
    )
    assert out == "1\n"


@pytest.mark.mpi
def test_long_temporary_directory_of_ranks(scripts: Any, tmp_path: Path) -> None:
    """The socket of a world is elsewhere then, for this user alone, and only as long as it is needed."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    out = scripts.run(
        """
        import glob, stat
        from executorlib.transports import address

        made = []
        address.socket_directory = lambda name, make=address.socket_directory: made.append(make(name)) or made[-1]
        with Executor(**OPTIONS) as executor:
            print(executor.submit(abs, -1, resource_dict={"cores": 2}).result(40))
            (folder,) = made
            print(oct(stat.S_IMODE(os.stat(folder).st_mode)), os.listdir(folder))
        print(os.path.exists(folder), os.listdir(os.environ["TMPDIR"]))
        """,
        {"max_cores": 2},
        env={"TMPDIR": str(folder)},
    )
    assert out.splitlines() == ["[1, 1]", "0o700 ['router']", "False []"]


def test_working_directory_that_was_removed(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Even in a removed folder, calls run or say what is wrong."""
    out = quietly(
        scripts,
        """
        import tempfile
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        os.rmdir(folder)
        try:
            with Executor(**OPTIONS) as executor:
                print(executor.submit(abs, -1).result(20))
        except (OSError, RuntimeError) as error:
            print("error")
        """,
        row.arguments(),
    )
    assert out.strip() in ("1", "error")


@pytest.mark.rows("fork", "jobs")
def test_relative_paths_without_a_working_directory(row: Any, scripts: Any) -> None:
    out = scripts.run(
        """
        import tempfile
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        os.rmdir(folder)
        for options in ({"cache_directory": "cache"}, {"resource_dict": {"cwd": "sub"}}):
            try:
                Executor(**{**OPTIONS, **options})
            except ValueError as error:
                print(error)
        """,
        row.arguments(),
    )
    first, second = out.splitlines()
    for line, named in ((first, "cache_directory"), (second, "cwd")):
        assert named in line
        assert "working directory was removed" in line


@pytest.mark.rows("fork", "spawn", "jobs", "block-fork")
@pytest.mark.parametrize("name", ["back\\slash", "new\nline", "quo'te \"$x"], ids=["backslash", "newline", "quotes"])
def test_paths_with_characters_that_are_rare(row: Any, tmp_path: Path, name: str) -> None:
    folder, cwd = tmp_path / f"{name} cache", tmp_path / f"{name} cwd"
    for _ in range(2):  # the second time from the cache
        with row.make(cache_directory=str(folder), resource_dict={"cwd": str(cwd)}) as executor:
            assert executor.submit(os.getcwd).result(30) == str(cwd)


@pytest.mark.linux
@pytest.mark.rows("fork", "spawn", "jobs", "block-fork")
def test_proc_that_is_not_mounted(row: Any, scripts: Any, tmp_path: Path) -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        pytest.skip("/proc cannot be hidden here (as root it can)")
    path = tmp_path / "script.py"
    source = """
        import signal
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        if __name__ == "__main__":
            with Executor(**OPTIONS) as executor:
                print(os.path.exists("/proc/self"), executor.submit(abs, -1).result(30))
                print("SIGKILL" in str(executor.submit(die).exception(30)))
    """
    path.write_text(scripts.prelude + textwrap.dedent(source))
    done = subprocess.run(
        [*hide, sys.executable, str(path)],
        env={**os.environ, "TEST_OPTIONS": json.dumps(row.arguments())},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.splitlines() == ["False 1", "True"], done.stderr


def test_modules_in_the_working_directory_hide_no_others(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Workers do not mistake a user's queue.py beside the data for the standard library's."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("queue", "selectors", "signal", "struct", "zmq", "cloudpickle"):
        (folder / f"{name}.py").write_text("raise ImportError('the wrong module')\n")
    out = scripts.run(
        """
        os.chdir("work")
        with Executor(**OPTIONS) as executor:
            print(executor.submit(abs, -1).result(20))
        """,
        row.arguments(),
    )
    assert out == "1\n"


MANY_ARGUMENTS = """
    import sys
    # More than Linux takes as one argument: what `script.py data/*.xyz` may be.
    sys.argv += [f"data/{number:06}.xyz" for number in range(12_000)]
    with Executor(**OPTIONS) as executor:
        results = executor.submit(lambda: __import__("sys").argv, resource_dict=NEEDS).result(40)
        for result in results if NEEDS else [results]:
            print(result == sys.argv, len(result) > 12_000)
"""


def test_many_arguments(row: Any, scripts: Any) -> None:
    assert scripts.run(f"NEEDS = {{}}\n{textwrap.dedent(MANY_ARGUMENTS)}", row.arguments()) == "True True\n"


@pytest.mark.mpi
def test_many_arguments_of_ranks(scripts: Any) -> None:
    out = scripts.run(f"NEEDS = {{'cores': 2}}\n{textwrap.dedent(MANY_ARGUMENTS)}", {"max_cores": 2})
    assert out == "True True\n" * 2


# Threads that cannot be started.

NO_THREADS = """\
import resource

def work(folder):
    import pathlib, time
    while not pathlib.Path(folder, "open").exists():
        time.sleep(0.01)
    pathlib.Path(folder, "done").touch()
    return 1

other = Executor(**OPTIONS["row"])
future = other.submit(work, OPTIONS["folder"])
while not future.running():
    pass
Executor(**OPTIONS["row"]).shutdown()  # what is loaded once is there from now on
os.setresuid(OPTIONS["user"], OPTIONS["user"], 0)  # root is free of the limit
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
for _ in range(3):
    try:
        Executor(**OPTIONS["row"])
    except RuntimeError as error:
        print(error)
print(len(os.listdir("/proc/self/fd")) - before)
os.setresuid(0, 0, 0)
open(os.path.join(OPTIONS["folder"], "open"), "w").close()
# The call goes on to its end, although nobody waits for it but the end of this program.
"""


@pytest.mark.linux
@pytest.mark.rows("fork")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who has no thread left")
def test_threads_that_cannot_be_started(row: Any, scripts: Any, tmp_path: Path) -> None:
    """`ulimit -u`: the constructor fails and leaves nothing, and another executor's calls still finish."""
    out = scripts.run(NO_THREADS, {"row": row.arguments(), "folder": str(tmp_path), "user": 54321})
    assert out.splitlines() == ["can't start new thread"] * 3 + ["0"]
    assert (tmp_path / "done").exists()
