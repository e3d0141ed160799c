"""The node's side of `relay.executor_side`: holds the connection to the executor and drives a `LocalLauncher` here.

One relay runs on every node of a Slurm allocation (`slurm.nodes`), or in the job of each worker of a block
(`flux.workers`). The node agent starts the workers, and the relay passes messages between them and the executor, many
at once when many come at once.

The executor sends ``["do", [[worker number, header, number of frames], ...]]`` followed by all the frames. A header is
a message for the worker or one of ``["start", {...}]``, ``["kill", signal]``, ``["grant", call numbers]`` and
``["recall", count]``. The relay answers with ``["done", [...]]`` of the same form: messages of workers,
``["recalled", call numbers]`` and ``["exit", {...}]``.

Calls and results of workers that take call after call come in bulk and are not decoded here, so that they cost the
relay something for each turn and not for each call: ``["stream", number of calls]`` with the bytes for the worker's
connection as the only frame, and from the worker what `messages.Undecoded` makes. Only large calls come as messages,
because they need a memory file.

Other messages are ``["hello", {...}]`` and ``["bye", reason]`` from the relay, ``["resume"]`` and ``["end"]`` to it.

The relay ends with its executor, and ends all workers of its node.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from executorlib import machine, serialize
from executorlib.launchers.contract import Exit, Lifetime, Process
from executorlib.poller import Poller
from executorlib.resources import Resources
from executorlib.serialize import Frame
from executorlib.single_node.agent import PipeTransport
from executorlib.single_node.launcher import LocalLauncher
from executorlib.transports.curve import CONNECTION_VARIABLE, Credentials
from executorlib.transports.dealer import Dealer
from executorlib.worker import family, guard
from executorlib.worker.remote import hello

# These would make a node's own mpiexec start its ranks as steps of the allocation; the last ones since Slurm 23.11.
_OF_SLURM = ("SLURM_", "HYDRA_BOOTSTRAP", "HYDRA_LAUNCHER_EXTRA_ARGS", "I_MPI_HYDRA_BOOTSTRAP")
# Slurm's variables about the node that a program runs on. Its other variables describe the step of the relays.
_KEPT = ("SLURMD_NODENAME", "SLURM_NODEID", "SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN", "SLURM_JWT")
# Workers that are handed several calls at a time give many answers. These are gathered for this many seconds, because
# a message costs both ends about as much as ten calls do, and the workers have calls for longer than that.
_GATHER_SECONDS = 0.001
# If a process has said that it is about to exit, its exit is no news. So the report travels with the
# next message within this many seconds: a message of its own costs as much as a tenth of a fresh call.
_PLAIN_EXIT_SECONDS = 0.005


class _Process(Process):
    """A worker, and what the relay knows about it.

    Attributes:
        handed: Number of calls that it was handed, including those that were taken back.
        answered: Number of their answers seen here, which does not include those in a stream.
        leaving: Whether it has said that it is about to exit.
        waiting: Messages that came before it could take any.
    """

    def __init__(self, number: int, resources: Resources, single: bool) -> None:
        super().__init__(number, resources, Lifetime.CALL if single else Lifetime.BLOCK)
        self.handed = 0
        self.answered = 0
        self.leaving = False
        self.waiting: list[tuple[list[Any], list[Frame]]] = []

    @property
    def busy(self) -> bool:
        """True while it has a call that it has not answered."""
        return self.handed > self.answered


class Relay(Poller):
    """A loop with the interface `launchers.contract.Events`, between a connection and a launcher.

    Args:
        dealer: The connection.
        environ: Slurm's variables as the executor has them.
        launcher: Arguments of `LocalLauncher`.
    """

    def __init__(self, dealer: Dealer, environ: dict[str, str], launcher: dict[str, Any]) -> None:
        super().__init__()
        self._dealer = dealer
        self._environ = environ
        self._workers: dict[int, _Process] = {}
        self._parts: list[list[Any]] = []  # to be sent
        self._frames: list[Frame] = []
        self._exits: list[list[Any]] = []  # to be sent with the next message
        self._ended_by = ""
        self._many = False  # whether workers were handed several calls at a time
        for descriptor in dealer.descriptors:
            self.watch(descriptor, lambda: None)  # every turn calls `_take_messages`
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        # A Ctrl-C at the terminal is meant for the user's process, which decides what becomes of the calls.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.watch(self._wake_read, self._on_wake)
        self._launcher = LocalLauncher(self, hidden=_OF_SLURM, **launcher)

    def _on_signal(self, number: int, frame: object) -> None:
        self._ended_by = f"Slurm or a user has sent {signal.Signals(number).name} to the agent of this node"

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the executor is gone, or the node has to be left."""
        try:
            self._launcher.prepare()
            # Say hello only now, so that the node agent is already starting when the first calls arrive.
            _, about = hello()
            self._dealer.send(["hello", {**about, "node": os.environ.get("SLURMD_NODENAME", about["host"])}])
            while not self._ended_by:
                self._take_messages()
                if not self._send():
                    self.call_back(self.poll(self.next_timer()))
                elif self._many:
                    time.sleep(_GATHER_SECONDS)
            self._dealer.send(["bye", self._ended_by])
        except EOFError:
            pass  # the executor is gone
        finally:
            self._launcher.close()
            self._dealer.close()
            signal.set_wakeup_fd(-1)
            # Open sockets would make the interpreter warn at exit, which the user's program may take for errors.
            self._wake_read.close()
            self._wake_write.close()

    def _take_messages(self) -> None:
        while not self._ended_by and (message := self._dealer.take()) is not None:
            if message.header[0] == "end":
                raise EOFError
            if message.header[0] == "resume":
                self._launcher.resume()
                continue
            each = iter(message.frames)
            touched: dict[_Process, None] = {}
            calls = [header[1] for _, header, _ in message.header[1] if header[0] == "stream"]
            if calls:
                self._many = max(calls) > 1
            for number, header, count in message.header[1]:
                worker = self._obey(number, header, list(itertools.islice(each, count)))
                if worker is not None:
                    touched[worker] = None
            for worker in touched:
                self._pass_on(worker)

    def _put(self, number: int, header: list[Any], frames: Sequence[Frame] = ()) -> None:
        self._parts.append([number, header, len(frames)])
        self._frames += frames

    def _send(self) -> bool:
        """Send what has been queued; returns whether there was anything."""
        if not self._parts:
            return False
        parts, frames = self._parts + self._exits, self._frames
        self._parts, self._frames, self._exits = [], [], []
        self._dealer.send(["done", parts], frames)
        return True

    def _send_exits(self) -> None:
        self._parts += self._exits
        self._exits = []

    # -- the executor's messages ----------------------------------------------------------------------------------

    def _obey(self, number: int, header: list[Any], frames: list[Frame]) -> _Process | None:
        """Carry out an order; returns the worker if a message now waits for it."""
        kind = header[0]
        if kind == "start":
            needs = header[1]
            worker = self._workers[number] = _Process(number, Resources(**needs["resources"]), needs["single"])
            try:
                self._launcher.launch(worker)
            except Exception as error:  # no room for its files, for example
                if number in self._workers:
                    text = f"it could not be started: {type(error).__name__}: {error}"
                    self.on_exit(worker, Exit(None, text))
            return None
        known = self._workers.get(number)
        if known is None:
            return None  # it has ended, which the executor knows or will learn
        if kind == "kill":
            self._launcher.kill(known, header[1])
        elif kind == "recall":
            self._pass_on(known)
            self._put(number, ["recalled", () if known.permits is None else known.permits.take_back(header[1])])
        elif kind == "grant":
            # At once, although the calls may be waiting: a permit has to be there before its call.
            if known.permits is not None:
                known.permits.grant(header[1])
        else:
            known.waiting.append((header, frames))
            return known
        return None

    def _pass_on(self, worker: _Process) -> None:
        """Send a worker its waiting messages, once it can take any."""
        transport = worker.transport
        if transport is None or not worker.waiting:
            return
        waiting, worker.waiting = worker.waiting, []
        for header, frames in waiting:
            if header[0] == "stream":
                worker.handed += header[1]
                cast(PipeTransport, transport).channel.put_encoded(frames[0])
                continue
            if header[0] == "call":
                worker.handed += 1
            elif header[0] == "setup" and worker.resources.cores > 1:
                # mpiexec was not allowed to see these.
                header[1]["env"] = {**self._environ, **header[1].get("env", {})}
            transport.put(header, frames)
        transport.flush()

    # -- Events ---------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the next turn."""
        self.call_later(0.0, callback)

    def on_connected(self, process: Process) -> None:
        """Send the worker the messages that came before it was connected."""
        worker = self._workers[process.number]
        if process.permits is not None:
            cast(PipeTransport, process.transport).channel.pass_on()
        self._pass_on(worker)

    def on_message(self, process: Process, header: list[Any], frames: list[Frame]) -> None:
        """Pass a worker's message on to the executor."""
        worker = self._workers[process.number]
        if header[0] in ("result", "error"):
            worker.answered += 1
            worker.leaving = "leaving" in header[4]
        self._put(worker.number, header, frames)

    def on_recalled(self, process: Process, numbers: Sequence[int]) -> None:
        """Never called: `LocalLauncher` gives calls back by permits."""

    def on_node_lost(self, name: str) -> None:
        """Never called: there is only one node here."""

    def on_exit(self, process: Process, end: Exit) -> None:
        """Report the end of a worker, with the calls that it has not started."""
        worker = self._workers.pop(process.number)
        error = process.verdict or end.error
        about = {
            "pid": process.pid,
            "status": end.status,
            "text": end.text,
            "stderr": bytes(process.stderr).decode(errors="replace"),
            # The executor adds those that have not been handed over.
            "handed": worker.handed,
            "unstarted": list(end.unstarted),
        }
        if worker.leaving and end.status == 0:
            if not self._exits:
                self.call_later(_PLAIN_EXIT_SECONDS, self._send_exits)
            self._exits.append([worker.number, ["exit", about], 0])
        else:
            self._put(worker.number, ["exit", about], [] if error is None else serialize.dumps(error))
        if process.on_gone is not None:
            process.on_gone()


def main(environ: dict[str, str], launcher: dict[str, Any]) -> None:
    """Run as a node's relay; the credentials are in the environment.

    Args:
        environ: Slurm's variables as the executor has them.
        launcher: Arguments of `LocalLauncher`.
    """
    family.unblock()
    guard.begin()
    credentials = Credentials.parse(os.environ.pop(CONNECTION_VARIABLE, ""))
    for name in [name for name in os.environ if name.startswith("SLURM_") and name not in _KEPT]:
        del os.environ[name]
    os.environ.update(environ)
    launcher["lifetime"] = Lifetime[launcher["lifetime"]]
    launcher["stock"] = min(launcher["stock"], len(machine.usable_cpus()))
    try:
        dealer = Dealer(credentials, credentials.identity)
    except ConnectionError as error:
        sys.exit(f"executorlib: the agent of this node cannot connect: {error}")
    Relay(dealer, environ, launcher).run()
