"""A job of a queuing system: run one call of a cache directory and leave its result there.

The batch directory's file ``entries`` says which call: it has one line for each number in the job array. Anything may
have happened to the entry since the submission, so the job looks at it first: an entry that is done, or was claimed by
a later batch, is left alone.

Exit codes are for the session that waits: `RESULT` and `RAISED` say that the entry is in place, whatever a slow file
system shows.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import time

from executorlib import serialize
from executorlib.cache import batch_directory, entries, trust
from executorlib.worker import call, family, guard, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, NoReturn

    from executorlib.serialize import Frame

RESULT = 0
RAISED = 83  # the entry holds what the function raised; programs hardly ever use this code themselves
NOT_MINE = 84  # somebody else has claimed the call meanwhile
FAILED = 70  # EX_SOFTWARE of sysexits.h

# An environment variable of jobs whose system writes what they print to a file, but late: that file. The job writes to
# it directly, so that the output is complete when its entry is made.
OUTPUT_VARIABLE = "EXECUTORLIB_OUTPUT"

_PRINTED_BYTES = 1 << 20  # how much of the end of what a job printed is kept in its entry


def main(directory: str, part: str = "") -> None:
    """Run this job's call and exit.

    Args:
        directory: The batch directory.
        part: The part of the batch that this job runs, in the form that `cache.batch_directory.JobIds.file` takes.
    """
    family.unblock()
    guard.begin()
    family.adopt()
    code = FAILED
    try:
        code = run(directory, None, part)
        if "executorlib.worker.world" in sys.modules:
            from mpi4py import MPI

            # Not in `run`, whose caller may be a rank of another world that goes on using MPI.
            MPI.Finalize()
    except BaseException as error:
        sys.stderr.write(call.traceback_text(error))
    call.leave(code, family.end)


def run(directory: str, index: int | None, part: str = "") -> int:
    """Run one call of a batch, on every rank if it has several.

    Args:
        directory: The batch directory.
        index: The number of the call in the batch; None for the number that the queuing system tells this job.
        part: The part of the batch that this job runs, in the form that `cache.batch_directory.JobIds.file` takes.

    Returns:
        The exit code.
    """
    setup = pickle.loads(
        trust.read(os.path.join(directory, batch_directory.SETUP_FILE), batch_directory.root_of(directory))
    )
    output = os.environ.pop(OUTPUT_VARIABLE, "")
    if "element_variables" not in setup:
        setup = {**protocol.OLDER_SETUP, **setup}
    if index is None:
        index = protocol.element_number(setup["element_variables"])
    call.set_up(setup)
    # Python would write to a file in blocks: late, and out of order with standard error.
    with contextlib.suppress(AttributeError, ValueError):  # replaced or closed
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if setup.get("ranks", 1) > 1:
        return _run_ranks(directory, index, part, setup, output)
    if output:
        _print_to(output)
    job = _claimed(directory, index, part, setup)
    if isinstance(job, int):
        return job
    claim = Claim(job)
    answer, seconds = _run(job, claim)
    return _store(job, answer, seconds, claim)


def _print_to(output: str) -> None:
    """Write everything printed from now on to this file directly. If it cannot be opened, nothing changes."""
    with contextlib.suppress(OSError):
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        call.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)


def _claimed(directory: str, index: int, part: str, setup: dict[str, Any]) -> dict[str, Any] | int:
    """Return the entry to run, or the exit code if it is done, or is no longer ours."""
    root = batch_directory.root_of(directory)
    job_id = _job_id(setup)
    noted = batch_directory.JobIds.read(directory, index).of(index)
    if noted is None:
        # The session may have ended before noting the id, and whoever looks for this job needs it.
        if job_id:
            batch_directory.write_text(directory, batch_directory.JobIds.file(part), job_id)
    elif noted[0].strip("[]").isdecimal() and job_id.strip("[]").isdecimal() and noted[0] != job_id:
        # A controller too busy to answer may have accepted this batch anyway, and the session submitted it again.
        return NOT_MINE
    path = batch_directory.entries_of(directory)[index]
    entry = entries.read_input(path, root)
    if entry is not None and entry["batch"] != directory:
        return NOT_MINE
    ending = entries.read_ending(entries.output_of(path), root)
    if ending is not None:
        return RAISED if ending.failed else RESULT
    if entry is None and trust.is_there(path):
        entry = entries.read_input(path, root)
    if entry is None:
        raise FileNotFoundError(f"the call {path} was removed or is damaged; it can be submitted again")
    queue_id = int(job_id) if job_id.isdecimal() else job_id or None
    return {
        **entry,
        "path": path,
        "root": root,
        "index": index,
        "queue_id": queue_id,
        "job_output": os.path.join(directory, f"output.{index}"),
        "ranks": setup.get("ranks", 1),
    }


def _job_id(setup: dict[str, Any]) -> str:
    """Return this job's id in the queuing system; empty if the system does not say.

    Only that system's own variables count, because this may run within a job of another system. The text after a
    dot is the name of a server of PBS or Torque.
    """
    names = setup.get("id_variables", ())
    return next((os.environ[name].partition(".")[0] for name in names if os.environ.get(name)), "")


class Claim:
    """Compares what a job is about to run with what its entry is named after. Made before any of that is unpickled.

    The session made sure that both are the same. But an array may have changed, and changed back, while it was pickled,
    and the function's module may have another file by now. Then the result is kept under the key of what ran, and the
    one left in the entry is only for those who submitted this very job.

    Args:
        job: The entry, with the number of its ranks.

    Attributes:
        ran: The key of what is about to run, if that is something else.
        versions: The distributions that it reaches, with their versions, if they are known.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self.ran = ""
        self.versions: dict[str, str] | None = None
        if job["key"] is not None:
            from executorlib.keys import fingerprint

            fingerprint.prepare(fingerprint.Key(*job["key"]))

    def begin(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Derive the key of a call that is about to run."""
        job = self._job
        if job["key"] is None:  # the user named the entry
            return
        from executorlib.keys import fingerprint

        named: dict[str, Any]
        try:
            # Results of other entries have been loaded by now. In the key they count by name.
            if entries.refers_to_results(job["input_args"]):
                args = tuple(entries.load_with_names(job["input_args"]))
            named = kwargs
            if entries.refers_to_results(job["input_kwargs"]):
                named = entries.load_with_names(job["input_kwargs"])
            expected = fingerprint.Key(*job["key"])
            key = fingerprint.recompute(expected, fn, args, call.named_inputs(named, job["ranks"], ""))
        except Exception as error:
            self.ran = f"inputs without a key: {error}"
        else:
            self.ran = "" if key.name == expected.name else key.name
            self.versions = key.versions

    def kept_at(self) -> str | None:
        """Return the output file for the key of what ran, if that key is known and not the entry's."""
        if not self.ran or self.versions is None:
            return None
        return entries.beside(entries.output_of(self._job["path"]), self._job["key"][0], self.ran)


def _run(job: dict[str, Any], claim: Claim) -> tuple[call.Answer, float]:
    if job["run_time_max"] is not None:
        # The kernel keeps the time, because the function may not let Python threads run. SIGALRM has no other use here.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=2, chain=True)  # prints where the call is before it ends
        signal.setitimer(signal.ITIMER_REAL, job["run_time_max"])
    arguments = pickle.dumps((serialize.Pickled(job["input_args"]), serialize.Pickled(job["input_kwargs"])))
    options = {"error_log_file": job["error_log_file"]} if job["error_log_file"] else {}
    started = time.perf_counter()
    with _no_silent_exit():
        answer = call.run(job["function"], [arguments], {"executorlib_worker_id": 0}, options, claim)
    seconds = time.perf_counter() - started
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.unregister(signal.SIGALRM)
    return answer, seconds


@contextlib.contextmanager
def _no_silent_exit() -> Iterator[None]:
    """Make sure that `os._exit` in a function does not look as if there were a result, which would start dependents."""
    process, leave = os.getpid(), os._exit

    def leave_without_result(status: int) -> NoReturn:
        if os.getpid() == process and status in (RESULT, RAISED):
            os.write(2, f"executorlib: the function ended its process by os._exit({status})\n".encode())
            status = FAILED
        leave(status)

    os._exit = leave_without_result
    try:
        yield
    finally:
        os._exit = leave


def _store(job: dict[str, Any], answer: call.Answer, seconds: float, claim: Claim) -> int:
    """Replace the waiting entry with the finished one."""
    path = job["path"]
    output, root = entries.output_of(path), job["root"]
    plain: dict[str, Any] = {"traceback": answer.traceback, "runtime": seconds, "queue_id": job["queue_id"]}
    if claim.versions is not None:
        plain[entries.VERSIONS] = claim.versions
    pickles = {
        **{name: job[name] for name in ("function", "input_args", "input_kwargs", "resource_dict")},
        "error" if answer.traceback else "output": _one_piece(answer.frames),
        **{name: serialize.dumps_in_band(value) for name, value in plain.items()},
        **_printed(job["job_output"], root),
    }
    kept_at = claim.kept_at()
    if kept_at is not None and answer.loaded:
        _keep(kept_at, pickles, root)
    unkept: dict[str, Any] = {}
    if not answer.loaded:
        unkept = {entries.NOT_KEPT: True}  # what was missing may be there when the call is submitted again
    elif claim.ran:
        unkept = {entries.NOT_KEPT: True, entries.RAN: claim.ran, "batch": job["batch"]}
    pickles.update({name: serialize.dumps_in_band(value) for name, value in unkept.items()})
    entries.write_pickles(output, pickles, root)
    entries.remove_input(path, root)
    return RAISED if answer.traceback else RESULT


def _keep(path: str, pickles: dict[str, bytes], root: str) -> None:
    """Write an entry for later sessions. Those who wait for the result must not lose it if that fails."""
    try:
        there = entries.read_ending(path, root)
        if there is None or not there.kept:
            entries.write_pickles(path, pickles, root)
    except Exception as error:
        sys.stderr.write(f"executorlib: the result was not kept in the cache file {path}: {error}\n")


def _printed(path: str, root: str) -> dict[str, bytes]:
    """Return what this job has printed so far, for its entry, because the batch directory is removed later."""
    call.flush()
    try:
        # A network file system may not show all that this process has written yet.
        data = trust.read(path, root, last=_PRINTED_BYTES)
        size = os.path.getsize(path)
    except OSError:
        return {}
    if not data:
        return {}
    cut = f"[{size - len(data)} bytes before this were cut]\n" if size > len(data) else ""
    return {
        entries.PRINTED: serialize.dumps_in_band(cut + data.decode(errors="replace")),
        entries.PRINTED_BYTES: serialize.dumps_in_band(size),
    }


def _one_piece(frames: list[Frame]) -> bytes:
    """Return one pickle of an exception with large buffers beside it. Results never have any, see `call.run`."""
    return bytes(frames[0]) if len(frames) == 1 else serialize.dumps_in_band(serialize.loads(frames))


# The variables in which MPI libraries give a rank's number among the ranks of its node.
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def _choose_gpus(each: int, names: Sequence[str]) -> None:
    """Keep this rank's part of the node's GPUs, if the program that started the ranks shows all GPUs to each.

    Args:
        each: The number of GPUs of each rank.
        names: The variables in which the queuing system gives a rank's number on its node.
    """
    local_rank = protocol.first_number([*_LOCAL_RANK_VARIABLES, *names])
    if not each or local_rank is None:
        return
    for name in protocol.GPU_VARIABLES:
        devices = os.environ.get(name, "").split(",")
        if len(devices) > each:
            os.environ[name] = ",".join(devices[local_rank * each : (local_rank + 1) * each])


def _run_ranks(directory: str, index: int, part: str, setup: dict[str, Any], output: str) -> int:
    from mpi4py import MPI

    from executorlib.worker import world

    ranks = setup["ranks"]
    all_ranks = world.join()
    rank, size = all_ranks.Get_rank(), all_ranks.Get_size()
    if size != ranks:
        from executorlib.errors import describe_split_world

        library = MPI.Get_library_version().splitlines()[0]
        advice = "Use an mpi4py that was built for the MPI of the cluster, and the pmi_mode that suits it."
        sys.stderr.write(f"executorlib: {describe_split_world(ranks, 'the job', size, library, advice)}\n")
        return FAILED
    # Between nodes, appending is safe on few network file systems.
    if output and world.is_on_one_node(all_ranks):
        _print_to(output)
    _choose_gpus(setup["gpus_per_rank"], setup.get("local_rank_variables", ()))
    job: dict[str, Any] | int = all_ranks.bcast(_claimed(directory, index, part, setup) if rank == 0 else 0, 0)
    if isinstance(job, int):
        return job
    claim = Claim(job)
    answer, seconds = _run(job, claim)
    if answer.traceback:
        answer.traceback = f"on rank {rank} of {size}:\n{answer.traceback}"

    call.flush()  # the first rank reads what all ranks printed

    def give_up() -> None:
        _store(job, answer, seconds, claim)
        all_ranks.Abort(RAISED)

    value = _one_piece(answer.frames), answer.traceback, answer.loaded, claim.ran
    gathered = world.gather(all_ranks, value, give_up if answer.traceback else None)
    code = RESULT
    if gathered is not None:
        if any(ran != claim.ran for *_, ran in gathered):
            claim.ran, claim.versions = "code that differs between ranks: a module changed while they started", None
        ending = next((call.Answer([data], text, loaded=loaded) for data, text, loaded, _ in gathered if text), None)
        if ending is None:
            results = [serialize.Pickled(data) for data, *_ in gathered]
            ending = call.Answer([serialize.dumps_in_band(results)], "")
        code = _store(job, ending, seconds, claim)
    # A rank that leaves without this takes the others along, maybe before the result is in place.
    all_ranks.Barrier()
    return code
