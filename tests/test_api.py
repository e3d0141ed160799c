"""`executorlib.api`: real programs, started, spoken to, killed and impersonated."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, wait
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from conftest import Scripts
from contract.functions import alive, wait_for, wait_until_gone
from executorlib import api
from executorlib.api import (
    ExecutorlibSocketError,
    MpiExecSpawner,
    SocketInterface,
    SubprocessSpawner,
    interface_bootup,
    spawners,
)
from executorlib.api import interface as api_interface
from executorlib.api import program as api_program

# A program as libraries write them; `obey` is what a test adds.
PROGRAM = """\
import os, signal, sys
from executorlib.api import (
    interface_connect, interface_receive, interface_send, interface_shutdown
)

argv = sys.argv[1:]
options = dict(zip(argv[::2], argv[1::2]))
{before}
context, socket = interface_connect(host=options["--host"], port=options["--zmqport"])
while True:
    message = interface_receive(socket=socket)
    if message.get("shutdown"):
        interface_send(socket=socket, result_dict={{"result": True}})
        interface_shutdown(socket=socket, context=context)
        break
    exec(message["do"])
"""

MPI_PROGRAM = """\
import os, sys
from mpi4py import MPI
from executorlib.api import (
    interface_connect, interface_receive, interface_send, interface_shutdown
)

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
world = MPI.COMM_WORLD
context, socket = None, None
if world.rank == 0:
    context, socket = interface_connect(options["--host"], options["--zmqport"])
while True:
    message = world.bcast(interface_receive(socket))
    if message.get("shutdown"):
        interface_send(socket, {"result": world.size})
        interface_shutdown(socket, context)
        break
    if message.get("die") == world.rank:
        sys.stderr.write("last words\\n")
        sys.stderr.flush()
        os._exit(7)
    interface_send(socket, {"result": world.gather(os.getpid())})
"""


def answer(expression: str) -> dict[str, str]:
    """The message by which a program sends back what an expression is in it."""
    return {"do": f"interface_send(socket, {{'result': {expression}}})"}


class Booter:
    """Starts programs whose ends are noticed quickly, and shuts them down when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[SocketInterface] = []

    def keep(self, interface: SocketInterface) -> SocketInterface:
        self.started.append(interface)
        return interface

    def functions(self, name: str, spawner: SubprocessSpawner, **kwargs: Any) -> SocketInterface:
        """Start a program of the package."""
        command = [sys.executable, api.get_command_path(executable=name)]
        return self.keep(interface_bootup(command, spawner, **kwargs))

    def write(self, source: str) -> str:
        path = self._folder / f"program{len(list(self._folder.glob('program*')))}.py"
        path.write_text(source)
        return str(path)

    def __call__(
        self,
        before: str = "",
        *,
        spawner: SubprocessSpawner | None = None,
        source: str = PROGRAM,
        time_out_ms: int = 50,
    ) -> SocketInterface:
        program = self.write(source.format(before=before) if source is PROGRAM else source)
        interface = self.keep(SocketInterface(spawner or SubprocessSpawner(), time_out_ms=time_out_ms))
        port = str(interface.bind_to_random_port())
        command = [sys.executable, program, "--host", "localhost", "--zmqport", port]
        interface.bootup(command)
        return interface


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Booter]:
    booter = Booter(tmp_path)
    yield booter
    for interface in booter.started:
        interface.shutdown(wait=False)
    booter.started.clear()


def pid_of(interface: SocketInterface) -> int:
    process = interface._spawner._process  # type: ignore[union-attr]
    assert process is not None
    return process.pid


# The names that libraries use.


def test_signatures_are_those_of_executorlib_1() -> None:
    expected = {
        "cancel_items_in_queue": "(que)",
        "cloudpickle_register": "(ind=2)",
        "get_command_path": "(executable)",
        "interface_bootup": "(command_lst, connections, hostname_localhost=None, "
        "log_obj_size=False, worker_id=None, stop_function=None)",
        "interface_connect": "(host, port)",
        "interface_receive": "(socket)",
        "interface_send": "(socket, result_dict)",
        "interface_shutdown": "(socket, context)",
        "SocketInterface": "(spawner=None, log_obj_size=False, time_out_ms=1000)",
        "SocketInterface.bootup": "(self, command_lst=None, stop_function=None)",
        "SocketInterface.send_dict": "(self, input_dict)",
        "SocketInterface.send_and_receive_dict": "(self, input_dict)",
        "SocketInterface.shutdown": "(self, wait=True)",
        "SubprocessSpawner": "(cwd=None, cores=1, worker_id=0, openmpi_oversubscribe=False, threads_per_core=1)",
        "SubprocessSpawner.bootup": "(self, command_lst, stop_function=None)",
        "SubprocessSpawner.generate_command": "(self, command_lst)",
        "SubprocessSpawner.shutdown": "(self, wait=True)",
    }
    expected["MpiExecSpawner"] = expected["SubprocessSpawner"]
    for name, signature in expected.items():
        found: Any = api
        for part in name.split("."):
            found = getattr(found, part)
        bare = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in inspect.signature(found).parameters.values()
        ]
        assert str(inspect.Signature(bare)) == signature, name


def test_a_socket_error_is_a_broken_executor() -> None:
    assert issubclass(ExecutorlibSocketError, BrokenExecutor)
    assert issubclass(ExecutorlibSocketError, RuntimeError)


# Exchange.


def test_interface_bootup_starts_a_program_that_connects_back(boot: Booter) -> None:
    command = [sys.executable, boot.write(PROGRAM.format(before=""))]
    given = list(command)
    interface = interface_bootup(command, connections=SubprocessSpawner(), worker_id=4)
    assert interface.status
    argv = interface.send_and_receive_dict(answer("argv"))["result"]
    assert argv[::2] == ["--host", "--worker-id", "--zmqport"]
    assert argv[3] == "4"
    assert command == given
    assert interface.shutdown(wait=True) is True
    assert not interface.status


@pytest.mark.parametrize(("localhost", "host"), [(True, "localhost"), (False, "gethostname")])
def test_hostname_localhost_chooses_the_host_the_program_is_told(
    boot: Booter, monkeypatch: pytest.MonkeyPatch, localhost: bool, host: str
) -> None:
    monkeypatch.setattr(api_interface, "gethostname", lambda: "gethostname")
    commands: list[list[str]] = []

    class Recorder(SubprocessSpawner):
        def bootup(self, command_lst: list[str], stop_function: Callable[[], bool] | None = None) -> bool:
            commands.append(command_lst)
            return True

    interface_bootup(["program"], Recorder(), hostname_localhost=localhost).shutdown(wait=False)
    assert commands[0][:3] == ["program", "--host", host]


def test_a_machine_whose_name_is_not_resolved_is_localhost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*args: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(api_interface, "getaddrinfo", unknown)
    assert api_interface._host(None) == "localhost"


def test_messages_before_and_after_each_other_keep_their_order(boot: Booter) -> None:
    interface = boot()
    for number in range(20):
        interface.send_dict(answer(str(number)))
    assert [interface.receive_dict()["result"] for _ in range(20)] == list(range(20))


def test_large_messages_arrive_whole(boot: Booter) -> None:
    interface = boot()
    data = os.urandom(5_000_000)
    message = {"do": "interface_send(socket, {'result': message['data']})", "data": data}
    assert interface.send_and_receive_dict(message)["result"] == data


def test_a_message_sent_just_before_the_program_ends_is_received(boot: Booter) -> None:
    interface = boot()
    interface.send_dict({"do": "interface_send(socket, {'result': 1}); interface_shutdown(socket, context); exit()"})
    wait_until_gone(pid_of(interface))
    assert interface.receive_dict() == {"result": 1}
    assert isinstance(interface.receive_dict()["error"], ExecutorlibSocketError)


def test_a_dictionary_that_cannot_be_pickled_is_the_senders_error(boot: Booter) -> None:
    interface = boot()
    with pytest.raises(TypeError):
        interface.send_dict({"file": sys.stdout})
    assert interface.send_and_receive_dict(answer("1")) == {"result": 1}


def test_a_message_that_cannot_be_unpickled_is_an_error_in_its_place(boot: Booter) -> None:
    interface = boot()
    interface.send_dict({"do": "socket.send(b'no pickle')"})
    assert "error" in interface.receive_dict()
    assert interface.send_and_receive_dict(answer("1")) == {"result": 1}


def test_log_obj_size_logs_the_size_of_each_message(boot: Booter, caplog: pytest.LogCaptureFixture) -> None:
    program = boot.write(PROGRAM.format(before=""))
    interface = interface_bootup([sys.executable, program], SubprocessSpawner(), log_obj_size=True)
    message = answer("1")
    interface.send_and_receive_dict(message)
    records = list(caplog.records)
    interface.shutdown()
    assert [(each.name, each.levelno) for each in records] == [("executorlib", logging.WARNING)] * 2
    assert str(len(cloudpickle.dumps(message))) in records[0].getMessage()
    assert str(len(cloudpickle.dumps({"result": 1}))) in records[1].getMessage()


def test_the_ranks_without_a_socket_send_and_receive_nothing() -> None:
    assert api.interface_receive(None) == {}
    api.interface_send(None, {"result": 1})
    api.interface_shutdown(None, None)


# The surroundings that a spawner gives its program.


def test_the_program_gets_threads_and_a_working_directory(boot: Booter, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    interface = boot(spawner=SubprocessSpawner(cwd=str(folder), threads_per_core=3))
    found = interface.send_and_receive_dict(
        answer("(os.getcwd(), {k: v for k, v in os.environ.items() if '_THREADS' in k})")
    )["result"]
    assert os.path.samefile(found[0], folder)
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    ):
        assert found[1][name] == "3"


def test_the_keys_are_in_the_environment_and_nowhere_in_argv(boot: Booter) -> None:
    interface = boot()
    found = interface.send_and_receive_dict(
        answer("(sys.argv, os.environ[message['name']])") | {"name": api_program._KEYS_VARIABLE}
    )["result"]
    argv, keys = found
    assert not any(key in argument for key in keys.split() for argument in argv)
    assert api_program._KEYS_VARIABLE not in os.environ


def test_a_spawner_with_a_bootup_of_its_own_needs_no_change(boot: Booter) -> None:
    class Own(SubprocessSpawner):
        def bootup(self, command_lst: list[str], stop_function: Callable[[], bool] | None = None) -> bool:
            self._process = subprocess.Popen(
                args=self.generate_command(command_lst=command_lst),
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
            )
            return self.poll()

    before = dict(os.environ)
    interface = boot(spawner=Own())
    assert dict(os.environ) == before
    assert interface.send_and_receive_dict(answer("1")) == {"result": 1}
    assert interface.shutdown() is True


def test_a_stop_function_keeps_a_program_from_being_started() -> None:
    asked = []
    interface = interface_bootup(
        [sys.executable, "-c", ""], SubprocessSpawner(), stop_function=lambda: not asked.append(1)
    )
    assert asked == [1]
    assert not interface.status
    error = interface.send_and_receive_dict({})["error"]
    assert isinstance(error, ExecutorlibSocketError)
    assert "stop_function" in str(error)
    interface.shutdown()


def test_a_spawner_may_say_that_it_did_not_start_the_program() -> None:
    class Broken(SubprocessSpawner):
        def bootup(self, command_lst: list[str], stop_function: Callable[[], bool] | None = None) -> bool:
            return False

    interface = interface_bootup(["program"], Broken())
    assert not interface.status
    interface.shutdown()


def test_program_that_cannot_be_started_is_an_error_at_once() -> None:
    with pytest.raises(FileNotFoundError):
        interface_bootup(["/no/such/program"], SubprocessSpawner())
    interface = SocketInterface(SubprocessSpawner())
    with pytest.raises(ValueError, match="command_lst"):
        interface.bootup()
    interface.shutdown()
    with pytest.raises(ValueError, match="shut down"):
        interface.bootup(["program"])
    with pytest.raises(ExecutorlibSocketError, match="shut down"):
        interface.send_dict({})


def test_a_running_program_is_not_started_twice(boot: Booter) -> None:
    interface = boot()
    with pytest.raises(RuntimeError, match="running"):
        interface.bootup()


# Dead programs. Each way to die: what the program does, and what the error says of it.

DEATHS = {
    "exit": ("os._exit(7)", "exited with code 7"),
    "sys.exit": ("sys.exit(3)", "exited with code 3"),
    "raise": ("raise KeyError('why')", "exited with code 1"),
    "segfault": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_dead_program_is_an_error_that_says_how_it_ended(boot: Booter, death: str) -> None:
    action, told = DEATHS[death]
    interface = boot()
    error = interface.send_and_receive_dict({"do": f"print('last words', file=sys.stderr, flush=True); {action}"})[
        "error"
    ]
    assert isinstance(error, ExecutorlibSocketError)
    for part in (told, "program0.py", socket.gethostname(), "last words", "bootup()"):
        assert part in str(error)
    assert ("why" in str(error)) == (death == "raise")
    # It stays dead, for whoever sends or receives next.
    assert isinstance(interface.receive_dict()["error"], ExecutorlibSocketError)
    assert interface.shutdown() is None


@pytest.mark.parametrize("death", DEATHS)
def test_a_program_that_dies_before_it_connects_is_an_error_too(boot: Booter, death: str) -> None:
    action, told = DEATHS[death]
    interface = boot(before=action)
    with pytest.raises(ExecutorlibSocketError, match=f"{told}.* before it connected"):
        interface.send_dict({})
    assert isinstance(interface.send_and_receive_dict({})["error"], ExecutorlibSocketError)


def test_a_dead_program_is_started_again_on_the_same_port(boot: Booter) -> None:
    interface = boot()
    first = interface._spawner._process  # type: ignore[union-attr]
    assert first is not None
    # The first one's message, which nobody receives, is not mistaken for the second one's answer.
    interface.send_dict({"do": "interface_send(socket, {'result': 'stale'}); sys.exit()"})
    first.wait()
    interface.bootup()
    assert interface.status
    assert interface.send_and_receive_dict(answer("1")) == {"result": 1}
    assert interface.shutdown() is True


def test_a_program_that_closed_its_connection_is_an_error_to_send_to(
    boot: Booter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_interface, "_END_UNAWAITED_SECONDS", 0.1)
    interface = boot()
    interface.send_dict({"do": "interface_send(socket, {}); interface_shutdown(socket, context); signal.pause()"})
    assert interface.receive_dict() == {}

    def send_until_noticed() -> None:
        while True:
            interface.send_dict({})

    with pytest.raises(ExecutorlibSocketError, match="has closed its connection"):
        send_until_noticed()
    assert alive(pid_of(interface))
    interface.shutdown(wait=False)


def test_standard_error_is_shown_while_the_program_runs(
    boot: Booter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawners, "_STDERR_FILE_BYTES", 1000)
    interface = boot()
    for number in range(3):
        line = f"{number}" * 600
        interface.send_and_receive_dict({"do": f"print('{line}', file=sys.stderr, flush=True);" + answer("1")["do"]})
        interface.send_and_receive_dict(answer("1"))
        assert line in capsys.readouterr().err
    relay = interface._spawner._relay  # type: ignore[union-attr]
    assert relay is not None
    assert os.fstat(relay.file.fileno()).st_size < 1000


# Ends: however it comes about, the program is gone afterwards.


def test_shutdown_waits_for_what_the_program_still_does(boot: Booter, tmp_path: Path) -> None:
    interface = boot()
    go = tmp_path / "go"
    interface.send_dict({"do": f"while not os.path.exists({str(go)!r}): pass\nopen({str(go)!r} + '2', 'w').close()"})
    go.touch()
    assert interface.shutdown(wait=True) is True
    assert Path(f"{go}2").exists()


@pytest.mark.parametrize(
    "before",
    ["signal.pause()", "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"],
    ids=["sleeps", "ignores SIGTERM"],
)
@pytest.mark.parametrize("wait", [True, False])
def test_a_program_that_never_connected_is_ended(
    boot: Booter, monkeypatch: pytest.MonkeyPatch, before: str, wait: bool
) -> None:
    monkeypatch.setattr(spawners, "_TERM_SECONDS", 0.2)
    interface = boot(before=before)
    pid = pid_of(interface)
    assert interface.shutdown(wait=wait) is None
    wait_until_gone(pid, seconds=0.5)


def test_a_busy_program_is_ended_where_nobody_waits_for_it(
    boot: Booter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(api_interface, "_END_UNAWAITED_SECONDS", 0.1)
    interface = boot()
    child = tmp_path / "child"
    interface.send_dict(
        {
            "do": "import subprocess, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
            f"open({str(child)!r} + '~', 'w').write(str(child.pid))\n"
            f"os.rename({str(child)!r} + '~', {str(child)!r}); signal.pause()"
        }
    )
    pids = pid_of(interface), int(wait_for(child))
    assert interface.shutdown(wait=False) is None
    wait_until_gone(*pids)


def test_shutdown_can_be_repeated(boot: Booter) -> None:
    interface = boot()
    interface.send_and_receive_dict(answer("1"))
    assert interface.shutdown() is True
    assert interface.shutdown() is None
    assert interface.shutdown(wait=False) is None


def test_an_interface_that_is_dropped_ends_its_program(boot: Booter) -> None:
    interface = boot()
    interface.send_and_receive_dict(answer("1"))
    pid = pid_of(interface)
    boot.started.clear()
    del interface
    gc.collect()
    wait_until_gone(pid)


START = """
from executorlib.api import SubprocessSpawner, interface_bootup

interface = interface_bootup([sys.executable, OPTIONS["program"]], SubprocessSpawner())
print(interface.send_and_receive_dict({"do": "interface_send(socket, {'r': os.getpid()})"})["r"])
sys.stdout.flush()
"""


def test_the_program_ends_with_the_interpreter(boot: Booter, scripts: Scripts) -> None:
    program = boot.write(PROGRAM.format(before=""))
    pid = int(scripts.run(START, {"program": program}))
    wait_until_gone(pid)


def test_the_program_ends_when_its_library_is_killed(boot: Booter, scripts: Scripts) -> None:
    program = boot.write(PROGRAM.format(before=""))
    process = scripts.start(START + "sys.stdin.read()", {"program": program}, stdin=-1)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    wait_until_gone(pid)
    process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_of_the_library_leaves_the_program_alone(boot: Booter) -> None:
    interface = boot()
    interface.send_and_receive_dict(answer("1"))
    pid = os.fork()
    if pid == 0:
        interface._end()
        os._exit(0)
    os.waitpid(pid, 0)
    assert interface.send_and_receive_dict(answer("1")) == {"result": 1}
    assert interface.shutdown() is True


# Strangers.


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


class Stranger:
    """A DEALER that sends a bomb to an interface, with the keys it is given."""

    def __init__(self, port: str, bomb: Path, keys: tuple[bytes, bytes, bytes] | None) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        if keys is not None:
            self.socket.curve_serverkey, self.socket.curve_publickey = keys[:2]
            self.socket.curve_secretkey = keys[2]
        self.monitor = self.socket.get_monitor_socket()
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.socket.send(b"")
        self.socket.send(cloudpickle.dumps(Bomb(bomb)))

    def refused(self) -> bool:
        """Return whether the other end has closed the connection."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event == zmq.EVENT_DISCONNECTED:
                return True
        return False

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        self.context.term()


def port_of(interface: SocketInterface) -> str:
    return interface._command_lst[-1]


@pytest.mark.parametrize("keys", ["none", "of its own", "for another library"])
@pytest.mark.parametrize("first", [True, False], ids=["comes first", "comes later"])
def test_a_stranger_is_not_let_in(boot: Booter, tmp_path: Path, keys: str, first: bool) -> None:
    interface = boot()
    if not first:
        assert interface.send_and_receive_dict(answer("1")) == {"result": 1}
    # As if it knew the library's public key, which no stranger does.
    public = interface._listener.keys.split()[0].encode()
    own, other = zmq.curve_keypair(), zmq.curve_keypair()
    given = {"none": None, "of its own": (public, *own), "for another library": (other[0], *own)}
    stranger = Stranger(port_of(interface), tmp_path / "bomb", given[keys])
    while not stranger.refused():
        interface._listener.receive(5)
    assert interface.send_and_receive_dict(answer("2")) == {"result": 2}
    stranger.close()
    assert not (tmp_path / "bomb").exists()
    assert interface.shutdown() is True


def test_garbage_is_not_read(boot: Booter, tmp_path: Path) -> None:
    interface = boot()
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00"
    pieces = [b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), greeting + b"NULL".ljust(20, b"\0")]
    pieces.append(cloudpickle.dumps(Bomb(tmp_path / "bomb")))
    with contextlib.ExitStack() as stack:
        for piece in pieces:
            stranger = socket.create_connection(("127.0.0.1", int(port_of(interface))))
            stack.enter_context(stranger)
            stranger.sendall(piece)
        assert interface.send_and_receive_dict(answer("1")) == {"result": 1}
        assert interface.shutdown() is True
    assert not (tmp_path / "bomb").exists()


def test_a_second_program_with_the_key_is_not_mistaken_for_the_first(boot: Booter) -> None:
    interface = boot()
    assert interface.send_and_receive_dict(answer("1")) == {"result": 1}
    public, *own = interface._listener.keys.encode().split()
    second = Stranger(port_of(interface), Path("/nonexistent/bomb"), (public, own[0], own[1]))
    while not second.monitor.poll(5):
        interface._listener.receive(5)
    assert interface.send_and_receive_dict(answer("2")) == {"result": 2}
    second.close()


def test_a_program_without_keys_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "one two"):
        if value is not None:
            monkeypatch.setenv(api_program._KEYS_VARIABLE, value)
        with pytest.raises(ExecutorlibSocketError, match=r"interface_bootup\(\)"):
            api.interface_connect("localhost", "1234")


def test_a_program_with_the_keys_of_another_interface_is_told(boot: Booter, monkeypatch: pytest.MonkeyPatch) -> None:
    interface = boot()
    other = SocketInterface()
    monkeypatch.setenv(api_program._KEYS_VARIABLE, other._listener.keys)
    context, sock = api.interface_connect("localhost", port_of(interface))
    with pytest.raises(ExecutorlibSocketError, match=f"tcp://localhost:{port_of(interface)}"):
        api.interface_receive(sock)
    api.interface_shutdown(sock, context)
    other.shutdown()


def test_a_program_whose_library_is_gone_is_told_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api_program.atexit, "register", lambda function: None)
    interface = SocketInterface()
    port = interface.bind_to_random_port()
    monkeypatch.setenv(api_program._KEYS_VARIABLE, interface._listener.keys)
    context, sock = api.interface_connect("127.0.0.1", str(port))
    interface.shutdown()
    for _ in range(2):
        with pytest.raises(ExecutorlibSocketError):
            api.interface_receive(sock)
        api.interface_send(sock, {"result": 1})
    api.interface_shutdown(sock, context)


def test_a_host_that_cannot_be_resolved_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = SocketInterface()
    monkeypatch.setenv(api_program._KEYS_VARIABLE, keys._listener.keys)
    with pytest.raises(OSError, match=r"."):
        api.interface_connect("no.such.host.invalid", "1234")
    keys.shutdown()


def test_programs_may_close_their_socket_and_context_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interface = SocketInterface()
    port = interface.bind_to_random_port()
    monkeypatch.setenv(api_program._KEYS_VARIABLE, interface._listener.keys)
    context, sock = api.interface_connect("127.0.0.1", str(port))
    assert interface._listener.receive(2000) == b""
    sock.close()
    context.term()
    interface.shutdown()


def test_libzmq_does_not_abort_when_interfaces_close_amid_handshakes(scripts: Scripts) -> None:
    """It used to abort if a context ended while connections were being admitted."""
    scripts.run(
        """
        import socket, zmq
        from executorlib.api import SocketInterface

        for number in range(30):
            interface = SocketInterface()
            port = interface.bind_to_random_port()
            public, *own = interface._listener.keys.encode().split()
            context = zmq.Context()
            dealers = []
            for key in (own, zmq.curve_keypair(), None) * 2:
                dealer = context.socket(zmq.DEALER)
                if key is not None:
                    dealer.curve_serverkey = public
                    dealer.curve_publickey, dealer.curve_secretkey = key
                dealer.connect(f"tcp://127.0.0.1:{port}")
                dealer.send(b"")
                dealers.append(dealer)
            raw = socket.create_connection(("127.0.0.1", port))
            for _ in range(number % 4):
                interface._listener.receive(1)
            if number % 2:
                context.destroy(linger=0)
            interface.shutdown()
            raw.close()
            context.destroy(linger=0)
        """
    )


# Programs that come with the package.


def remember(value: int = 0, executorlib_worker_id: int = -1) -> tuple[int, int]:
    return value, executorlib_worker_id


def fail(text: str) -> None:
    raise ValueError(text)


class MoreThanArgs(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def fail_with_more_than_args(code: int) -> None:
    raise MoreThanArgs(code=code)


def ask(interface: SocketInterface, fn: Callable[..., Any], *args: Any, **extra: Any) -> Any:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        message = {"fn": fn, "args": args, "kwargs": {}, **extra}
        return interface.send_and_receive_dict(message)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_interactive_serial_runs_functions(boot: Booter) -> None:
    interface = boot.functions("interactive_serial.py", SubprocessSpawner(), worker_id=2)
    assert ask(interface, remember) == {"result": (0, 2)}
    assert ask(interface, lambda: {"value": 7}, init=True) == {"result": True}
    assert ask(interface, remember) == {"result": (7, 2)}
    assert ask(interface, remember, 1) == {"result": (1, 2)}
    assert ask(interface, sum, [1, 2]) == {"result": 3}
    error = ask(interface, fail, "no")["error"]
    assert (type(error), error.args) == (ValueError, ("no",))
    assert "in fail" in str(error.__cause__)
    error = ask(interface, fail_with_more_than_args, 5)["error"]
    assert (type(error), str(error), error.code) == (MoreThanArgs, "code 5", 5)
    assert isinstance(ask(interface, lambda: (i for i in []))["error"], TypeError)
    assert isinstance(interface.send_and_receive_dict({})["error"], KeyError)
    assert interface.shutdown() is True


def test_the_programs_find_modules_where_they_are_started(boot: Booter, tmp_path: Path) -> None:
    (tmp_path / "module_of_mine.py").write_text("def f(): return 'mine'\n")
    module = types.ModuleType("module_of_mine")
    exec("def f(): pass", module.__dict__)
    sys.modules["module_of_mine"] = module
    try:
        spawner = SubprocessSpawner(cwd=str(tmp_path))
        interface = boot.functions("interactive_serial.py", spawner)
        message = {"fn": module.f, "args": (), "kwargs": {}}
        assert interface.send_and_receive_dict(message) == {"result": "mine"}
        interface.shutdown()
    finally:
        del sys.modules["module_of_mine"]


def test_an_unknown_program_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"interactive_parallel\.py, interactive_serial\.py"):
        api.get_command_path("serial.py")


# MPI.


@pytest.fixture
def fake_mpiexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Have an mpiexec beside Python that says this of its version; returns its path."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    def make(version: str) -> str:
        script = tmp_path / "mpiexec"
        script.write_text(f"#!/bin/sh\necho '{version}'\n")
        script.chmod(0o755)
        return str(script)

    return make


@pytest.mark.parametrize(
    ("version", "root", "oversubscribe", "flags", "variables"),
    [
        ("mpiexec (Open MPI) 5.0.8", False, False, 0, 0),
        ("mpiexec (Open MPI) 5.0.8", False, True, 1, 0),
        ("mpirun (Open MPI) 4.1.4", True, True, 1, 2),
        ("HYDRA build details:", True, True, 0, 0),
        ("Intel(R) MPI Library for Linux", False, True, 0, 0),
    ],
)
def test_open_mpi_is_told_from_others(
    fake_mpiexec: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    root: bool,
    oversubscribe: bool,
    flags: int,
    variables: int,
) -> None:
    path = fake_mpiexec(version)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    spawner = MpiExecSpawner(cores=3, openmpi_oversubscribe=oversubscribe)
    command = spawner.generate_command(["program", "--zmqport", "1"])
    assert command[:3] == [path, "-n", "3"]
    assert command[-3:] == ["program", "--zmqport", "1"]
    assert command.count("--oversubscribe") == flags
    allowed = [name for name in spawner._environment() if name.startswith("OMPI_ALLOW")]
    assert len(allowed) == variables


def test_one_rank_needs_no_mpiexec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert MpiExecSpawner(cores=1).generate_command(["a", "b"]) == ["a", "b"]
    assert SubprocessSpawner(cores=2).generate_command(["a", "b"]) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"executorlib\[mpi\]"):
        interface_bootup(["a"], MpiExecSpawner(cores=2))


def two_ranks() -> MpiExecSpawner:
    return MpiExecSpawner(cores=2, openmpi_oversubscribe=True)


@pytest.mark.mpi
def test_a_program_with_ranks(boot: Booter) -> None:
    interface = boot(source=MPI_PROGRAM, spawner=two_ranks())
    pids = interface.send_and_receive_dict({})["result"]
    assert len(set(pids)) == 2
    assert interface.shutdown() == 2
    wait_until_gone(*pids)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_program(boot: Booter, rank: int) -> None:
    interface = boot(source=MPI_PROGRAM, spawner=two_ranks())
    pids = interface.send_and_receive_dict({})["result"]
    error = interface.send_and_receive_dict({"die": rank})["error"]
    assert isinstance(error, ExecutorlibSocketError)
    assert "last words" in str(error)
    wait_until_gone(*pids)


@pytest.mark.mpi
def test_mpiexec_killed_is_the_end_of_the_ranks(boot: Booter) -> None:
    interface = boot(source=MPI_PROGRAM, spawner=two_ranks())
    pids = interface.send_and_receive_dict({})["result"]
    os.kill(pid_of(interface), signal.SIGKILL)
    assert "SIGKILL" in str(interface.receive_dict()["error"])
    interface.shutdown()
    wait_until_gone(*pids)


@pytest.mark.mpi
def test_ranks_end_when_their_library_is_killed(boot: Booter, scripts: Scripts) -> None:
    process = scripts.start(
        """
        from executorlib.api import MpiExecSpawner, interface_bootup

        spawner = MpiExecSpawner(cores=2, openmpi_oversubscribe=True)
        interface = interface_bootup([sys.executable, OPTIONS["program"]], spawner)
        print(*interface.send_and_receive_dict({})["result"], flush=True)
        sys.stdin.read()
        """,
        {"program": boot.write(MPI_PROGRAM)},
        stdin=subprocess.PIPE,
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    wait_until_gone(*pids)
    process.communicate()


def rank_of(value: int = 0) -> tuple[int, int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank(), value


def fail_on(rank: int, together: bool) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == rank:
        raise ValueError(f"rank {rank} failed")
    if together:
        MPI.COMM_WORLD.Barrier()


@pytest.mark.mpi
def test_interactive_parallel_runs_functions_on_all_ranks(boot: Booter) -> None:
    interface = boot.functions("interactive_parallel.py", two_ranks())
    assert ask(interface, rank_of) == {"result": [(0, 0), (1, 0)]}
    assert ask(interface, lambda: {"value": 7}, init=True) == {"result": True}
    assert ask(interface, rank_of) == {"result": [(0, 7), (1, 7)]}
    error = ask(interface, fail_on, 1, False)["error"]
    assert (type(error), error.args) == (ValueError, ("rank 1 failed",))
    assert "in fail_on" in str(error.__cause__)
    assert isinstance(ask(interface, lambda: (i for i in []))["error"], TypeError)
    assert ask(interface, rank_of) == {"result": [(0, 7), (1, 7)]}
    assert interface.shutdown() is True


@pytest.mark.mpi
@pytest.mark.slow
def test_a_failed_rank_that_others_wait_for_ends_them_all(boot: Booter) -> None:
    interface = boot.functions("interactive_parallel.py", two_ranks())
    error = ask(interface, fail_on, 1, True)["error"]
    assert isinstance(error, ExecutorlibSocketError)
    assert "rank 1 failed" in str(error)
    interface.shutdown()


@pytest.mark.mpi
def test_interactive_parallel_with_one_rank_gives_the_plain_value(boot: Booter) -> None:
    interface = boot.functions("interactive_parallel.py", MpiExecSpawner(cores=1))
    assert ask(interface, rank_of) == {"result": (0, 0)}
    assert interface.shutdown() is True


# Helpers.


def test_cancel_items_in_queue_cancels_and_empties() -> None:
    que: queue.Queue[Any] = queue.Queue()
    running: Future[None] = Future()
    running.set_running_or_notify_cancel()
    waiting: Future[None] = Future()
    cancelled: Future[None] = Future()
    cancelled.cancel()
    for item in ({"future": waiting}, {"future": running}, {"shutdown": True}, 3):
        que.put(item)
    que.put({"future": cancelled})
    api.cancel_items_in_queue(que=que)
    assert que.empty()
    que.join()
    assert waiting.cancelled()
    assert running.running()
    assert wait([waiting, cancelled], timeout=5).not_done == set()


def test_cloudpickle_register_pickles_the_callers_module_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[str] = []
    monkeypatch.setattr(cloudpickle, "register_pickle_by_value", lambda module: registered.append(module.__name__))
    library = types.ModuleType("a_library")
    source = """
    from executorlib.api import cloudpickle_register
    def register(*args):
        cloudpickle_register(*args)
    """
    exec(textwrap.dedent(source), library.__dict__)
    sys.modules["a_library"] = library
    try:
        library.register()
        library.register(1)
        library.register(1000)
    finally:
        del sys.modules["a_library"]
    outermost = inspect.stack()[-1].frame.f_globals["__name__"]
    assert registered == [__name__, "a_library", outermost]
