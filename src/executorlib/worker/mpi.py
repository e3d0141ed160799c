"""A rank of an MPI world: rank 0 talks to the executor, all ranks run the call, rank 0 returns all results.

If a rank fails and the others do not follow, because they may be waiting for it inside the function, it tells the
executor itself over a connection of its own, and the executor ends the world. If all ranks get through, rank 0 reports
the failure, and the world goes on.

Ranks start at the same time on cores that they may share, and the call waits for the last one. So what only a rank with
a connection needs is loaded when it connects.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from executorlib import serialize
from executorlib.transports import CONNECTION_VARIABLE
from executorlib.worker import call, family, guard, protocol, world

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from executorlib.serialize import Frame
    from executorlib.transports.dealer import Dealer
    from executorlib.worker.records import Reporter


def main(
    single: bool,
    path: str = "",
    identity: str = "",
    numbered: Sequence[str] | bool = False,
    local: bool = False,
) -> None:
    """Run as one rank.

    Args:
        single: True if the world runs one call, for which it need not announce that it is ready.
        path: The file with the credentials. By default they are in the environment.
        identity: The world's name, if the credentials are for several. By default it is part of them.
        numbered: The variables that may hold the job's number in its array, which is appended to the name. False
            appends nothing; sessions of older versions give True.
        local: True if `mpiexec` started it below a node agent. Then nobody else would end it if both are killed.
    """
    family.unblock()
    if local:
        family.follow()
    guard.begin()
    given = os.environ.pop(CONNECTION_VARIABLE, "")

    def connect(rank: int) -> Dealer:
        from executorlib.transports.curve import Credentials
        from executorlib.transports.dealer import Dealer
        from executorlib.worker.remote import end_by_force

        credentials = Credentials.read(path) if path else Credentials.parse(given)
        name = (identity or credentials.identity) + protocol.element_text(numbered)
        return Dealer(credentials, f"{name}.{rank}", on_lost=end_by_force)

    from mpi4py import MPI

    ranks = world.join()
    try:
        rank = Rank(ranks, connect, MPI.Get_library_version().partition("\n")[0].strip("\0 "))
        rank.serve(single)
    except BaseException as error:
        if isinstance(error, (EOFError, ConnectionError)):  # the executor is gone
            sys.stderr.write(f"executorlib: this world ends: {error}\n")
        else:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        ranks.Abort(1)
    rank.close()


class Rank:
    """The state of one rank.

    Args:
        world: A communicator of all ranks, used by nobody else.
        connect: Makes a connection to the executor, given the number of the rank.
        library: The MPI library's name and version.
    """

    def __init__(self, world: Any, connect: Callable[[int], Dealer], library: str) -> None:
        self._world = world
        self._rank = world.Get_rank()
        self._connect = connect
        self._dealer: Dealer | Reporter | None = None
        self._reporter: Reporter | None = None
        self._kept: dict[int, bytes] = {}
        if self._rank == 0:
            from executorlib.worker.remote import hello

            self._connection().send(hello(world.Get_size(), library))

    def _connection(self) -> Dealer | Reporter:
        if self._dealer is None:
            self._dealer = self._connect(self._rank)
        return self._dealer

    def _receive(self) -> tuple[list[Any], list[Frame]]:
        """Return the executor's next message, on every rank."""
        content = None
        if self._rank == 0:
            message = self._connection().receive()
            content = (message.header, message.frames)
        received: tuple[list[Any], list[Frame]] = self._world.bcast(content, 0)
        return received

    def serve(self, single: bool) -> None:
        """Take calls until told to stop. A world of one call is told so once its result has been read."""
        (kind, *rest), frames = self._receive()
        if kind == "stop":
            return  # nobody needs this world any more
        setup = rest[0]
        defaults = call.Defaults(setup.get("slot", 0))
        try:
            call.set_up(self._share(setup))
            if "records" in setup:
                from executorlib.worker.records import Reporter

                self._dealer = self._reporter = Reporter(self._dealer, lambda: self._connect(self._rank), self._rank)
            if frames:
                defaults.initialize(frames, setup.get("init_key"))
        except BaseException as error:
            text = call.bounded(call.traceback_text(error))
            self._connection().send(["error", 0, 0.0, text, {}], call.dump_setup_error(error))
            self._world.Barrier()  # wait until the executor ends this world
            raise
        if not single:
            # Not before every rank has got through: a later failure would look like a call's.
            self._world.Barrier()
            if self._rank == 0:
                self._connection().send(["ready"])
        while True:
            header, frames = self._receive()
            if header[0] == "stop":
                return
            if header[0] == "forget":
                self._kept.clear()
                continue
            self._run(header, frames, defaults)

    def _share(self, setup: dict[str, Any]) -> dict[str, Any]:
        """Return the setup with this rank's part of the cores and GPUs."""
        setup = dict(setup)
        size = self._world.Get_size()
        if "shares" in setup:
            here = os.environ.get("SLURMD_NODENAME", socket.gethostname())
            ranks = self._world.allgather(here)
            setup.update(setup.pop("shares").get(here, {"cores": [], "gpus": []}))
            first, size = ranks[: self._rank].count(here), ranks.count(here)
        else:
            first = self._rank
        for kind in ("cores", "gpus"):
            names = setup.get(kind) or []
            each = len(names) // size
            if each:
                setup[kind] = names[first * each : (first + 1) * each]
        return setup

    def _run(self, header: list[Any], frames: list[Frame], defaults: call.Defaults) -> None:
        _, number, function_number, options = header
        arguments = call.keep(self._kept, options, frames)
        function = self._kept[function_number]
        if self._reporter is not None:
            self._reporter.number = number
        entry = defaults.entry(function, options, self._kept, whole=self._rank == 0)
        started = time.perf_counter()
        answer = call.run(function, arguments, defaults.values, options, entry)
        seconds = time.perf_counter() - started
        text = f"on rank {self._rank} of {self._world.Get_size()}:\n{answer.traceback}" if answer.traceback else ""

        def tell() -> None:
            self._connection().send(["error", number, seconds, text, {}], answer.frames)

        ran = "" if entry is None else entry.name
        value = text, ran, [bytes(frame) for frame in answer.frames]
        gathered = world.gather(self._world, value, tell if text else None)
        if gathered is None:
            return
        for trace, _, error in gathered:
            if trace:
                self._connection().send(["error", number, seconds, trace, {"whole": True}], error)
                return
        everything = [rank_frames for *_, rank_frames in gathered]
        warning = ""
        more: dict[str, Any] = {"counts": list(map(len, everything))}
        if entry is not None:
            if any(other != ran for _, other, _ in gathered):
                entry.problem = (
                    entry.problem or "its ranks did not all run the same code: a module changed while they started"
                )
            # With an entry, each rank's result is one frame (see `call.run`). It is not rebuilt here, because that runs
            # the user's code, which may fail or make something else of it.
            results = [serialize.Pickled(*rank_frames) for rank_frames in everything]
            warning = entry.store(serialize.dumps_in_band(results), answer.seconds)
            if entry.is_other:
                more["other"] = True
        frames = [frame for rank_frames in everything for frame in rank_frames]
        self._connection().send(["result", number, seconds, warning, more], frames)

    def close(self) -> None:
        """Send what is left and close the connection, if there is one."""
        if self._dealer is not None:
            self._dealer.close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m executorlib.worker.mpi FILE_WITH_CREDENTIALS [IDENTITY]")
    main(False, sys.argv[1], "".join(sys.argv[2:]))
