"""Runs programs for their answer, such as `sbatch` and `squeue`, while the loop goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from executorlib.launchers.contract import Events

# How many commands run at once. A controller answers them one after the other anyway.
_AT_ONCE = 4
# Seconds after which a command is given up. Slurm's commands themselves wait about half a minute for the controller
# before they report that it does not answer.
_TIME_LIMIT = 120.0


@dataclass(frozen=True)
class CommandOutput:
    """The answer of a command.

    Attributes:
        code: Exit code; negative for a signal, 127 if the command could not be run, None if it took too long.
        output: Standard output.
        error: Standard error, or why it could not be run.
    """

    code: int | None
    output: str
    error: str

    @property
    def ok(self) -> bool:
        """True if the command succeeded."""
        return self.code == 0

    @property
    def text(self) -> str:
        """The command's message, for an error text."""
        return (self.error.strip() or self.output.strip() or f"exit code {self.code}, without any message").strip()


class Commands:
    """Runs commands, a few at a time, in the order in which they were requested.

    Args:
        events: The loop.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._waiting: deque[_Command] = deque()
        self._running: set[_Command] = set()

    def run(
        self,
        argv: list[str],
        on_answer: Callable[[CommandOutput], None],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command; ``on_answer`` is called in the loop's thread, never from within this call."""
        self._waiting.append(_Command(self, argv, on_answer, cwd, env))
        self._events.call_later(0.0, self._start)

    @property
    def busy(self) -> bool:
        """True while any command has not answered."""
        return bool(self._waiting or self._running)

    def _start(self) -> None:
        while self._waiting and len(self._running) < _AT_ONCE:
            command = self._waiting.popleft()
            self._running.add(command)
            command.start(self._events)

    def on_end(self, command: _Command, answer: CommandOutput) -> None:
        """A command has ended: start the next one and pass the answer on."""
        self._running.discard(command)
        self._start()
        command.on_answer(answer)

    def close(self) -> None:
        """Kill the running commands and forget the others; no answer follows."""
        self._waiting.clear()
        for command in list(self._running):
            command.kill()
            command.release(self._events)
        self._running.clear()


class _Command:
    """One command: its process and its output so far."""

    def __init__(
        self,
        owner: Commands,
        argv: list[str],
        on_answer: Callable[[CommandOutput], None],
        cwd: str | None,
        env: Mapping[str, str] | None,
    ) -> None:
        self.on_answer = on_answer
        self._owner = owner
        self._argv = argv
        self._cwd = cwd
        self._env = env
        self._popen: subprocess.Popen[bytes] | None = None
        self._said = {"output": bytearray(), "error": bytearray()}
        self._open: dict[str, int] = {}
        self._late = False

    def start(self, events: Events) -> None:
        try:
            self._popen = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._cwd,
                env=self._env,
                # A Ctrl-C at the terminal is meant for the user's program, which decides what becomes of the jobs.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a null byte in an argument
            said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
            failed = CommandOutput(127, "", f"{self._argv[0]} cannot be run: {said}")
            events.call_later(0.0, lambda: self._owner.on_end(self, failed))
            return
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        for name, pipe in (("output", self._popen.stdout), ("error", self._popen.stderr)):
            fd = pipe.fileno()
            os.set_blocking(fd, False)
            self._open[name] = fd
            events.watch(fd, self._reader(events, name, fd))
        # Held weakly: the callback may keep calls and their results alive, and the answer itself can be long.
        expire = weakref.WeakMethod(self._expire)
        events.call_later(_TIME_LIMIT, lambda: (known := expire()) and known())

    def _reader(self, events: Events, name: str, fd: int) -> Callable[[], None]:
        def read() -> None:
            while True:
                try:
                    data = os.read(fd, 65536)
                except BlockingIOError:
                    return
                if not data:
                    break
                self._said[name] += data
            events.unwatch(fd)
            del self._open[name]
            if not self._open:
                self._end(events)

        return read

    def _end(self, events: Events) -> None:
        assert self._popen is not None
        # Both pipes are closed, so the command has exited or is about to.
        code: int | None = self._popen.wait()
        self.release(events)
        output, error = (bytes(said).decode(errors="replace") for said in self._said.values())
        if self._late:
            code, error = None, f"{self._argv[0]} did not answer within {_TIME_LIMIT:g} s. {error}"
        self._owner.on_end(self, CommandOutput(code, output, error))

    def _expire(self) -> None:
        if self._open:
            self._late = True
            self.kill()

    def kill(self) -> None:
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, 9)

    def release(self, events: Events) -> None:
        for fd in self._open.values():
            events.unwatch(fd)
        self._open.clear()
        if self._popen is not None:
            for pipe in (self._popen.stdout, self._popen.stderr):
                if pipe is not None:
                    pipe.close()
            self._popen.wait()
