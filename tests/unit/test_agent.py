"""The node agent by itself: what it starts, what it reports, and that nothing outlives it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.functions import alive, until, wait_for, wait_until_gone
from executorlib import serialize
from executorlib.single_node import agent as single_node_agent
from executorlib.transports.messages import Connection, Message
from executorlib.worker.agent import _kill_group
from executorlib.worker.family import children_of, descendants
from executorlib.worker.protocol import SocketPermits, WorkerPermits
from unit.properties import examples, repeatable

WAIT = 20.0
# The promise: all descendants of the agent are gone within five seconds of its end.
END_SECONDS = 5.0

linux = pytest.mark.linux


def readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


class Worker:
    """A child of the agent, with the descriptors that came with the news of it."""

    def __init__(self, message: Message, pooled: bool) -> None:
        _, self.number, self.pid = message.header
        self.stderr, *sockets = message.fds
        made = [socket.socket(fileno=fd) for fd in sockets]
        assert len(made) in (0, 3 if pooled else 1)
        self.connection = Connection(made[0]) if made else None
        self.permits = SocketPermits(*made[1:]) if made[1:] else None

    def raw(self) -> socket.socket:
        assert self.connection is not None
        return self.connection._sock

    def send(self, header: list[Any], frames: Sequence[Any] = ()) -> None:
        assert self.connection is not None
        self.connection.send(header, frames)

    def receive(self) -> Message:
        assert self.connection is not None
        if not self.connection.pending():
            assert readable(self.connection.fileno(), WAIT), f"worker {self.number} says nothing"
        return self.connection.receive()

    def call(self, fn: Callable[..., Any], *args: Any, number: int = 1) -> None:
        """Have it run a function; the first thing that it is told is its set-up."""
        frames = [serialize.dumps_in_band(fn), *serialize.dumps_arguments(args, {})]
        self.send(["call", number, number, {"new": [number], "now": True}], frames)

    def set_up(self) -> None:
        self.send(["setup", {"slot": 0}])

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Set it up, have it run a function, return the result."""
        self.set_up()
        self.call(fn, *args)
        message = self.receive()
        assert message.header[0] == "result", message.header
        return serialize.loads(message.frames)

    def errors(self) -> str:
        """All that it wrote to standard error; it has ended."""
        text = b""
        while readable(self.stderr, WAIT) and (data := os.read(self.stderr, 65536)):
            text += data
        return text.decode()

    def close(self) -> None:
        os.close(self.stderr)
        if self.connection is not None:
            self.connection.close()
        if self.permits is not None:
            self.permits.close()


class Client:
    """The executor's end: starts an agent as a launcher does, and talks to it."""

    def __init__(self, preload: Sequence[str] = (), path: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {[*path, *sys.path]!r}; from executorlib.worker.agent import main; "
            f"main({theirs.fileno()}, {list(preload)!r}, {{}})"
        )
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", code],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno(), *pass_fds],
                start_new_session=True,
            )
        self.connection = Connection(ours)
        self.kept: deque[Message] = deque()
        self.workers: list[Worker] = []

    def receive(self) -> Message:
        if not self.connection.pending():
            assert readable(self.connection.fileno(), WAIT), "the agent says nothing"
        return self.connection.receive()

    def expect(self, kind: str, number: int) -> Message:
        """Wait for a message of this kind about this worker; others are kept for later."""
        for message in self.kept:
            if message.header[:2] == [kind, number]:
                self.kept.remove(message)
                return message
        while True:
            message = self.receive()
            if message.header[:2] == [kind, number]:
                return message
            self.kept.append(message)

    def start(self, number: int = 1, **options: Any) -> Worker:
        self.connection.send(["start", number, options])
        worker = Worker(self.expect("started", number), bool(options.get("pooled")))
        self.workers.append(worker)
        return worker

    def kill(self, number: int, signal_number: int) -> None:
        self.connection.send(["kill", number, signal_number])

    def status(self, number: int = 1) -> int:
        """Wait for a worker's end."""
        status = self.expect("exited", number).header[2]
        assert isinstance(status, int)
        return status

    def end(self) -> tuple[int, str]:
        """Close the connection; returns the agent's exit code and what it said."""
        self.connection.close()
        _, errors = self.popen.communicate(timeout=WAIT)
        for worker in self.workers:
            worker.close()
        self.workers.clear()
        return self.popen.returncode, errors.decode()


@pytest.fixture
def agent() -> Iterator[Client]:
    client = Client()
    assert client.receive().header == ["hello", client.popen.pid]
    yield client
    assert client.end() == (0, "")


@pytest.fixture
def make_agent() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(*args: Any, **kwargs: Any) -> Client:
        made.append(Client(*args, **kwargs))
        return made[-1]

    yield make
    for client in made:
        if client.popen.returncode is None:
            client.end()


class Lifeline:
    """A pipe whose writing end all descendants of an agent inherit: its end of file says that none is left."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def hear(self, count: int) -> None:
        """Wait for that many descendants to report."""
        heard = b""
        while len(heard) < count:
            assert readable(self.reading, WAIT), f"{len(heard)} of {count} have reported"
            heard += os.read(self.reading, count)

    def let_go(self) -> None:
        """Close this process's own writing end."""
        os.close(self.writing)
        self.writing = -1

    def wait_for_silence(self) -> None:
        assert readable(self.reading, END_SECONDS), "some process is left"
        assert os.read(self.reading, 100) == b""

    def close(self) -> None:
        os.close(self.reading)
        if self.writing >= 0:
            os.close(self.writing)


@pytest.fixture
def lifeline() -> Iterator[Lifeline]:
    line = Lifeline()
    yield line
    line.close()


def leave_family(lifeline: int, stay: bool) -> None:
    """In a worker: start processes in its group, in sessions of their own, and without parents. Each reports."""
    import os
    import time

    def live() -> None:
        os.write(lifeline, b"x")
        time.sleep(60)
        os._exit(0)

    if os.fork() == 0:
        live()
    if os.fork() == 0:
        os.setsid()
        live()
    if os.fork() == 0:  # the daemon's way
        os.setsid()
        if os.fork() == 0:
            live()
        os._exit(0)
    if stay:
        live()


FAMILY = 3


def family_of(pid: int, count: int) -> list[int]:
    """Return the children of a process, once this many live: the daemon's parent may end after its child reports."""
    found: list[int] = []

    def all_there() -> bool:
        found[:] = [child for child in children_of(pid) if alive(child)]
        return len(found) == count

    until(all_there)
    return found


def of_main(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that is sent by value: the worker need not import this module."""
    import types

    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    return types.FunctionType(fn.__code__, namespace, fn.__name__, fn.__defaults__)


# Starting and ending workers.


def test_agent_that_is_started_with_signals_blocked(make_agent: Callable[..., Client]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        client = make_agent()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert client.receive().header[0] == "hello"
    assert client.start(1).run(signal.pthread_sigmask, signal.SIG_BLOCK, ()) == set()
    assert client.status(1) == 0
    client.start(2)
    client.kill(2, signal.SIGTERM)
    assert client.status(2) == signal.SIGTERM


def test_worker_runs_one_call_and_ends(agent: Client) -> None:
    worker = agent.start(7)
    assert worker.number == 7
    assert worker.run(of_main(lambda: __import__("os").getpid())) == worker.pid
    assert agent.status(7) == 0
    assert worker.errors() == ""


def test_workers_are_new_and_of_their_own_group(agent: Client) -> None:
    def look() -> tuple[int, int]:
        import os

        return os.getpgrp(), os.getppid()

    workers = [agent.start(number) for number in (1, 2, 3)]
    assert len({worker.pid for worker in workers}) == 3
    for worker in workers:
        assert worker.run(look) == (worker.pid, agent.popen.pid)
        assert agent.status(worker.number) == 0


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("pass", 0),
        ("import os; os._exit(3)", 3 << 8),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", signal.SIGSEGV),
    ],
)
def test_status_of_every_end(agent: Client, source: str, status: int) -> None:
    worker = agent.start()
    worker.set_up()
    worker.call(exec, source)
    # A core dump would be said by a bit of its own.
    assert agent.status() & ~0x80 == status


def test_standard_error_of_a_worker(agent: Client) -> None:
    def complain() -> None:
        import os
        import sys

        sys.stderr.write("something is wrong\n")
        sys.stderr.flush()
        os.write(2, b"in C, too\n")

    worker = agent.start()
    worker.run(complain)
    assert agent.status() == 0
    assert worker.errors() == "something is wrong\nin C, too\n"


@linux
def test_worker_that_writes_endlessly_gets_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest waits, because the loop has other work."""
    shown: list[bytes] = []
    monkeypatch.setattr(single_node_agent, "_write_stderr", shown.append)
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    assert os.write(writing, b"x" * (1 << 20)) == 1 << 20
    tail = bytearray()
    assert single_node_agent._forward(reading, tail)
    assert shown == [b"x" * 65536]
    assert readable(reading, WAIT)
    os.close(writing)
    assert not single_node_agent._forward(reading, tail, single_node_agent._LAST_PIECES)
    assert sum(map(len, shown)) == 1 << 20
    os.close(reading)


def test_worker_of_a_block(agent: Client) -> None:
    worker = agent.start(pooled=True)
    assert worker.permits is not None
    worker.set_up()
    assert worker.receive().header == ["ready"]
    for number in (1, 2, 3):
        worker.call(abs, -number, number=number)
        message = worker.receive()
        assert message.header[:2] == ["result", number]
        assert serialize.loads(message.frames) == number
    worker.send(["stop"])
    assert agent.status() == 0


def test_worker_of_a_block_skips_calls_that_were_taken_back(agent: Client) -> None:
    worker = agent.start(pooled=True)
    assert worker.permits is not None
    worker.set_up()
    assert worker.receive().header == ["ready"]
    function = serialize.dumps_in_band(abs)
    worker.permits.grant([5, 6])
    assert worker.permits.take_back(1) == [5]
    worker.send(["call", 5, 1, {"new": [1]}], [function, *serialize.dumps_arguments((-5,), {})])
    worker.send(["call", 6, 1, {}], serialize.dumps_arguments((-6,), {}))
    message = worker.receive()
    assert message.header[:2] == ["result", 6]
    assert serialize.loads(message.frames) == 6
    worker.send(["stop"])
    assert agent.status() == 0


def test_many_one_after_the_other_leave_nothing(agent: Client) -> None:
    def open_files() -> int:
        return len(os.listdir(f"/proc/{agent.popen.pid}/fd")) if sys.platform == "linux" else 0

    agent.start(1).run(abs, -1)
    agent.status(1)
    before = open_files()
    for number in range(2, 12):
        assert agent.start(number).run(abs, -number) == number
        assert agent.status(number) == 0
    assert open_files() == before
    assert children_of(agent.popen.pid) == []


def test_kill(agent: Client) -> None:
    worker = agent.start()
    agent.kill(99, signal.SIGKILL)  # nobody: it may have ended just before
    agent.kill(1, signal.SIGKILL)
    assert agent.status() == signal.SIGKILL
    wait_until_gone(worker.pid)
    agent.kill(1, signal.SIGKILL)
    agent.start(2).run(abs, -1)
    assert agent.status(2) == 0


def test_interrupt_is_an_exception_in_the_call(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    client = make_agent(pass_fds=[lifeline.writing])
    assert client.receive().header[0] == "hello"
    fd = lifeline.writing

    def wait() -> None:
        import os
        import time

        os.write(fd, b"x")
        time.sleep(60)

    worker = client.start()
    worker.set_up()
    worker.call(wait)
    lifeline.hear(1)
    client.kill(1, signal.SIGINT)
    message = worker.receive()
    assert message.header[0] == "error"
    assert "the function raised KeyboardInterrupt" in str(serialize.loads(message.frames))
    assert client.status() == 0
    assert client.end() == (0, "")


def test_interrupt_leaves_the_agent_alone(agent: Client) -> None:
    os.killpg(agent.popen.pid, signal.SIGINT)
    assert agent.start().run(abs, -1) == 1
    assert agent.status() == 0


def test_end_of_its_stream_ends_a_worker(agent: Client) -> None:
    """Nobody else holds the executor's end, least of all the worker."""
    worker = agent.start()
    worker.close()
    agent.workers.clear()
    try:
        assert readable(agent.connection.fileno(), END_SECONDS), "it waits for what can never come"
    finally:
        agent.kill(1, signal.SIGKILL)
    assert agent.status() == 0


# Programs.


def test_program(agent: Client, tmp_path: Path) -> None:
    source = "import os, sys; sys.stderr.write(os.getcwd() + ' ' + ','.join(sorted(os.environ))); sys.exit(5)"
    worker = agent.start(
        argv=[sys.executable, "-S", "-c", source], env={"ONLY": "this"}, cwd=str(tmp_path), own_channel=True
    )
    assert worker.connection is None
    assert agent.status() == 5 << 8
    directory, names = worker.errors().split(" ")
    assert directory == str(tmp_path)
    assert set(names.split(",")) - {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"} == {"ONLY"}


def test_program_is_found_by_path(agent: Client, tmp_path: Path) -> None:
    program = tmp_path / "found-by-path"
    program.write_text("#!/bin/sh\necho found >&2\n")
    program.chmod(0o755)
    worker = agent.start(argv=["found-by-path"], env={"PATH": str(tmp_path)}, own_channel=True)
    assert agent.status() == 0
    assert worker.errors() == "found\n"


def test_program_finds_its_descriptors(agent: Client) -> None:
    """And no others: neither the agent's connection nor another worker's."""
    source = textwrap.dedent("""\
        import os
        os.write(3, b"connection")
        assert os.read(4, 100) == (7).to_bytes(8, "little")
        def is_open(fd):
            try:
                os.fstat(fd)
            except OSError:
                return False
            return True
        os.write(3, repr([fd for fd in range(64) if is_open(fd)]).encode())
        """)
    other = agent.start(1)
    worker = agent.start(2, pooled=True, argv=[sys.executable, "-c", source], env=dict(os.environ))
    assert worker.raw().recv(100) == b"connection"
    assert worker.permits is not None
    worker.permits.grant([7])
    assert worker.raw().recv(1000) == b"[0, 1, 2, 3, 4]"
    assert agent.status(2) == 0
    assert other.run(abs, -1) == 1


@pytest.mark.parametrize(
    ("argv", "cwd", "text"),
    [
        (["no-such-program", "-n"], None, "no-such-program"),
        (["/", "-n"], None, "cannot execute /"),
        ([sys.executable], "/no/such/directory", "/no/such/directory"),
    ],
)
def test_program_that_cannot_be_run(agent: Client, argv: list[str], cwd: str | None, text: str) -> None:
    worker = agent.start(argv=argv, env=dict(os.environ), cwd=cwd, own_channel=True)
    assert agent.status() != 0
    assert text in worker.errors()
    assert agent.start(2).run(abs, -1) == 1


@linux
def test_start_that_fails(make_agent: Callable[..., Client], tmp_path: Path) -> None:
    """Here, descriptors are missing. The failure is reported and leaks nothing, and the agent goes on."""
    (tmp_path / "few_files.py").write_text(
        "import os, resource\n"
        "highest = max(map(int, os.listdir('/proc/self/fd')))\n"
        "while os.open('/dev/null', os.O_RDONLY) < highest: pass\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
    )
    client = make_agent(["few_files"], [str(tmp_path)])
    assert client.receive().header[0] == "hello"
    folder = f"/proc/{client.popen.pid}/fd"
    counts = []
    for number in range(1, 21):
        client.connection.send(["start", number, {"pooled": True}])
        assert "Too many open files" in client.expect("failed", number).header[2]
        counts.append(len(os.listdir(folder)))
    # The answer comes before the last ones are closed; one that leaked each time would be twenty.
    assert max(counts) < min(counts) + 10
    assert client.end() == (0, "")


# The leftovers of a worker.


@linux
def test_family_of_a_worker_that_is_killed(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    client = make_agent(pass_fds=[lifeline.writing])
    worker = client.start()
    worker.set_up()
    worker.call(of_main(leave_family), lifeline.writing, True)
    lifeline.hear(FAMILY + 1)
    in_group, session = family_of(worker.pid, 2)
    client.kill(1, signal.SIGKILL)
    assert client.status() == signal.SIGKILL
    wait_until_gone(in_group, session, worker.pid)


@linux
@pytest.mark.parametrize("by_end", [False, True])
def test_shared_memory_of_ranks_that_are_killed_as_they_start(
    make_agent: Callable[..., Client], tmp_path: Path, by_end: bool
) -> None:
    """Memory of another program with the same name is left alone."""
    own, other = (Path(f"/dev/shm/mpich_shm_test{os.getpid()}_{number}") for number in (1, 2))
    for path in (own, other):
        path.write_bytes(bytes(4096))
    code = f"""if True:
        import mmap, time
        file = open({str(own)!r}, "r+b")
        memory = mmap.mmap(file.fileno(), 4096)
        file.close()
        open({str(tmp_path / "mapped")!r}, "w").close()
        time.sleep(60)
    """
    try:
        client = make_agent()
        argv = ["/bin/sh", "-c", '"$@" & wait', "sh", sys.executable, "-c", code]  # as mpiexec has its ranks
        client.start(argv=argv, env=dict(os.environ), own_channel=True)
        wait_for(tmp_path / "mapped")
        if by_end:
            client.end()
        else:
            client.kill(1, signal.SIGKILL)
            assert client.status() == signal.SIGKILL
        assert (own.exists(), other.exists()) == (False, True)
    finally:
        own.unlink(missing_ok=True)
        other.unlink()


@linux
def test_mpiexec_without_processes_is_ended(make_agent: Callable[..., Client], tmp_path: Path) -> None:
    """MPICH's waits forever if its proxy dies at a bad moment. One with ranks may run as long as it likes."""
    (tmp_path / "impatient.py").write_text("from executorlib.worker import agent\nagent._ALONE_SECONDS = 2.0\n")
    client = make_agent(["impatient"], [str(tmp_path)])
    options = {"env": dict(os.environ), "own_channel": True, "forks": True}
    busy = client.start(1, argv=["/bin/sh", "-c", "sleep 600 & wait"], **options)
    until(lambda: children_of(busy.pid), WAIT)
    client.start(2, argv=["/bin/sleep", "600"], **options)
    assert client.status(2) == signal.SIGKILL
    assert alive(busy.pid)


@linux
def test_family_of_a_worker_that_dies(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    """The rest of its group is killed, because it may wait for its dead parent forever."""
    client = make_agent(pass_fds=[lifeline.writing])
    fd = lifeline.writing

    def die() -> None:
        import os
        import time

        pid = os.fork()
        if pid == 0:
            os.write(fd, b"x")
            time.sleep(60)
        os.write(2, str(pid).encode())
        os._exit(3)

    worker = client.start()
    worker.set_up()
    worker.call(die)
    assert client.status() == 3 << 8
    wait_until_gone(int(os.read(worker.stderr, 100)))


@linux
def test_family_of_a_worker_that_ends_well_lives_on(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    """A function may start a server; it ends with the executor, not with the call."""
    client = make_agent(pass_fds=[lifeline.writing])
    worker = client.start()
    worker.run(of_main(leave_family), lifeline.writing, False)
    assert client.status() == 0
    lifeline.hear(FAMILY)
    family_of(client.popen.pid, FAMILY)
    lifeline.let_go()
    assert client.end() == (0, "")
    lifeline.wait_for_silence()


# The agent's own end takes all along.


@linux
def test_end_of_the_connection_ends_everything(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    client = make_agent(pass_fds=[lifeline.writing])
    for number in (1, 2):
        worker = client.start(number)
        worker.set_up()
        worker.call(of_main(leave_family), lifeline.writing, True)
    client.start(3)  # in stock
    lifeline.hear(2 * (FAMILY + 1))
    lifeline.let_go()
    client.connection.close()
    lifeline.wait_for_silence()
    assert client.end() == (0, "")


@linux
def test_end_although_workers_ignore_signals(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    client = make_agent(pass_fds=[lifeline.writing])
    fd = lifeline.writing

    def ignore() -> None:
        import os
        import signal
        import time

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        os.write(fd, b"x")
        time.sleep(60)

    worker = client.start()
    worker.set_up()
    worker.call(ignore)
    lifeline.hear(1)
    lifeline.let_go()
    client.connection.close()
    lifeline.wait_for_silence()


@linux
def test_end_while_workers_fork_on(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    """Processes that are born while the others are killed are found, too."""
    client = make_agent(pass_fds=[lifeline.writing])
    fd = lifeline.writing

    def breed() -> None:
        import os
        import time

        os.write(fd, b"x")
        for _ in range(100):  # each hands on to a child and lingers
            if os.fork() != 0:
                break
            os.setsid()
            time.sleep(0.002)
        time.sleep(60)

    worker = client.start()
    worker.set_up()
    worker.call(breed)
    lifeline.hear(1)
    lifeline.let_go()
    client.connection.close()
    lifeline.wait_for_silence()


def test_processes_of_another_user(make_agent: Callable[..., Client], tmp_path: Path) -> None:
    """Processes started by `sudo` cannot be signalled. They must not keep others alive, and nothing waits for them."""
    source = "import os\ndef refuse(pid, number):\n    raise PermissionError(1, 'Operation not permitted')\n"
    (tmp_path / "another_user.py").write_text(f"{source}os.kill = os.killpg = refuse\n")
    agent = make_agent(["another_user"], [str(tmp_path)])
    assert agent.receive().header[0] == "hello"
    agent.start(1)
    agent.kill(1, signal.SIGTERM)
    agent.kill(1, signal.SIGKILL)
    assert agent.start(2).run(abs, -1) == 1
    started = time.monotonic()
    assert agent.end() == (0, "")
    assert time.monotonic() - started < END_SECONDS


def test_end_does_not_wait_forever() -> None:
    """A process that the kernel cannot end (here, one that is not really killed) is left behind."""
    code = """
        import os
        from executorlib.worker import family
        family._REAP_SECONDS = 0.1
        os.kill = lambda pid, number: None
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent is gone
            os._exit(0)
        family.end()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=WAIT, check=True)


@linux
def test_agent_that_is_killed_takes_its_workers_along(make_agent: Callable[..., Client], lifeline: Lifeline) -> None:
    client = make_agent(pass_fds=[lifeline.writing])
    fd = lifeline.writing

    def wait() -> None:
        import os
        import time

        os.write(fd, b"x")
        time.sleep(60)

    for number in (1, 2):
        worker = client.start(number)
        worker.set_up()
        worker.call(wait)
    client.start(3)
    lifeline.hear(2)
    lifeline.let_go()
    client.popen.kill()
    lifeline.wait_for_silence()


def be_killed(lifeline: int, tell: int, copied: bool) -> None:
    """In a process of its own: the user's, which starts an agent and workers."""
    client = Client(pass_fds=[lifeline])
    worker = client.start()
    worker.set_up()
    worker.call(of_main(leave_family), lifeline, True)
    if copied:
        copy = os.fork()
        if copy == 0:
            os.close(lifeline)
            signal.pause()
        os.write(tell, str(copy).encode())
    os.close(lifeline)
    signal.pause()


@linux
@pytest.mark.parametrize("copied", [False, True], ids=["alone", "with a forked copy"])
def test_user_process_that_is_killed(lifeline: Lifeline, copied: bool) -> None:
    """Even if a forked copy of it lives on and holds the connection open."""
    tell_read, tell_write = os.pipe()
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import be_killed; "
        f"be_killed({lifeline.writing}, {tell_write}, {copied})"
    )
    user = subprocess.Popen([sys.executable, "-c", code], pass_fds=[lifeline.writing, tell_write])
    os.close(tell_write)
    lifeline.let_go()
    copy = 0
    try:
        lifeline.hear(FAMILY + 1)
        if copied:
            assert readable(tell_read, WAIT)
            copy = int(os.read(tell_read, 100))
        user.kill()
        user.wait(WAIT)
        lifeline.wait_for_silence()
    finally:
        user.kill()
        user.wait(WAIT)
        if copy:
            os.kill(copy, signal.SIGKILL)
        os.close(tell_read)


# Preloading.


def test_preload(make_agent: Callable[..., Client], tmp_path: Path) -> None:
    (tmp_path / "preloaded.py").write_text("import os\npid = os.getpid()\n")
    client = make_agent(["preloaded"], [str(tmp_path)])

    def look() -> Any:
        import sys

        return sys.modules["preloaded"].pid

    assert client.start().run(look) == client.popen.pid
    assert client.end() == (0, "")


def test_output_of_preloaded_modules_is_printed_once(tmp_path: Path) -> None:
    """Every child is a copy of the agent, but must not write the agent's buffered output again."""
    (tmp_path / "preloaded.py").write_text("import ctypes\nprint('imported')\nctypes.CDLL(None).printf(b'loaded')\n")
    script = "from executorlib import SingleNodeExecutor\nif __name__ == '__main__':\n    "
    script += "with SingleNodeExecutor(2, start_method='fork', preload=['preloaded']) as executor:\n        "
    script += "assert list(executor.map(abs, range(4))) == [0, 1, 2, 3]\n"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environ.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\nloaded", "")


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "No module named 'preloaded'"), ("1 / 0", "ZeroDivisionError"), ("raise SystemExit(4)", "")],
)
def test_preload_that_fails(make_agent: Callable[..., Client], tmp_path: Path, source: str | None, said: str) -> None:
    if source is not None:
        (tmp_path / "preloaded.py").write_text(source)
    client = make_agent(["preloaded"], [str(tmp_path)])
    with pytest.raises((EOFError, ConnectionResetError)):
        client.receive()
    code, errors = client.end()
    assert code != 0
    assert said in errors


@pytest.mark.parametrize("name", ["random", "numpy.random"])
def test_workers_have_random_numbers_of_their_own(make_agent: Callable[..., Client], name: str) -> None:
    """Although all are copies of one process, in which the generator was seeded."""
    pytest.importorskip(name)
    client = make_agent([name])

    def draw(name: str) -> float:
        import sys

        return float(sys.modules[name].random())

    drawn = [client.start(number).run(draw, name) for number in range(1, 5)]
    assert len(set(drawn)) == 4


# Permits: who reads a call's number first, the worker or the executor, has the call.


@settings(repeatable, max_examples=examples(150))
@given(st.lists(st.sampled_from(["hand", "hand", "recall", "read", "read", "answer"]), max_size=60), st.data())
def test_each_call_runs_once_however_often_it_moves(steps: list[str], data: st.DataObject) -> None:
    give, take = socket.socketpair()
    with give, take:
        given, permits = SocketPermits(give, take), WorkerPermits(take)
        stream: deque[tuple[int, bool]] = deque()  # messages that the worker has not read
        held: deque[int] = deque()  # calls that the executor believes the worker to have
        waiting = deque(range(1, 200))
        answers: deque[int] = deque()
        run: list[int] = []

        def hand(count: int) -> None:
            numbers = [waiting.popleft() for _ in range(min(count, len(waiting)))]
            if not numbers:
                return
            idle = not held
            stream.extend((number, idle and number == numbers[0]) for number in numbers)
            held.extend(numbers)
            given.grant(numbers[idle:])

        def recall(count: int) -> None:
            numbers = given.take_back(count)
            for number in numbers:
                held.remove(number)
            waiting.extendleft(reversed(numbers))

        def read() -> None:
            number, now = stream.popleft()
            if now or permits.allow(number):
                run.append(number)
                answers.append(number)

        for step in steps:
            if step == "hand":
                hand(data.draw(st.integers(1, 5), label="calls"))
            elif step == "recall":
                recall(data.draw(st.integers(1, 5), label="calls"))
            elif step == "read" and stream:
                read()
            elif step == "answer" and answers:
                held.remove(answers.popleft())
        while stream:
            read()
    assert len(set(run)) == len(run)
    # Calls that were handed over have run, except those that were taken back and not handed over again.
    assert set(held) - set(answers) == set()
    assert set(run) == set(range(1, 200)) - set(waiting)


def test_permit_of_a_later_call_is_kept_for_it() -> None:
    give, take = socket.socketpair()
    with give, take:
        permits = WorkerPermits(take)
        SocketPermits(give, take).grant([3])
        assert not permits.allow(1)
        assert not permits.allow(2)
        assert permits.allow(3)
        assert not permits.allow(3)


def test_no_permit_when_the_executor_is_gone() -> None:
    give, take = socket.socketpair()
    with take:
        give.close()
        assert not WorkerPermits(take).allow(1)


# Looking at and ending processes.


@linux
def testdescendants() -> None:
    """The shell waits for its child, which waits for its standard input to end."""
    process = subprocess.Popen(
        ["sh", "-c", "sh -c 'echo deep; cat; true'; true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"deep\n"
    assert process.pid in children_of(os.getpid())
    [child] = children_of(process.pid)
    wait_for_children(child, 1)
    [grandchild] = children_of(child)
    assert descendants(process.pid) == [child, grandchild]
    assert descendants(grandchild) == []
    process.communicate(timeout=WAIT)


def wait_for_children(pid: int, count: int) -> None:
    give_up = time.monotonic() + WAIT
    while len(children_of(pid)) < count:
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_processes_that_are_gone() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait(WAIT)
    assert children_of(process.pid) == []
    assert descendants(process.pid) == []
    _kill_group(process.pid, signal.SIGKILL)


def test_kill_group_of_a_process_without_one() -> None:
    """This is the state between its fork and its first steps."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    _kill_group(process.pid, signal.SIGKILL)
    process.communicate(timeout=WAIT)
    assert process.returncode == -signal.SIGKILL
