"""A job of a queuing system: run one call of a cache directory and leave its result there.

The batch directory says which: its file ``entries`` has a line for each element of the job array, with its number.
Between the submission and now, anything may have happened to the entry, so the job looks at it first: an entry that is
done or was claimed by a later batch is left alone.

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

from executorlib import batches, entries, files, serialize
from executorlib.worker import call, family, guard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

    from executorlib.serialize import Frame

RESULT = 0
RAISED = 83  # the entry holds what the function raised; hardly any program ends with this code by itself
NOT_MINE = 84  # somebody else has claimed the call since
FAILED = 70  # EX_SOFTWARE of sysexits.h

_PRINTED_BYTES = 1 << 20  # of what a job printed, so many are kept in its entry, the last ones


def main(directory: str, part: str = "") -> None:
    """Run this job's call and exit.

    Args:
        directory: The batch directory.
        part: The part of the batch that this job is of, as `batches.JobIds.file` takes it.
    """
    family.unblock()
    guard.begin()
    family.adopt()
    code = FAILED
    try:
        code = run(directory, call.element_number(), part)
    except BaseException as error:
        sys.stderr.write(call.traceback_text(error))
    call.leave(code, family.end)


def run(directory: str, index: int, part: str = "") -> int:
    """Run one call of a batch, on every rank where it has several.

    Args:
        directory: The batch directory.
        index: Number of the call in the batch.
        part: The part of the batch that this job is of, as `batches.JobIds.file` takes it.

    Returns:
        The exit code.
    """
    setup = pickle.loads(files.read(os.path.join(directory, batches.SETUP_FILE), batches.root_of(directory)))
    call.set_up(setup)
    if setup.get("ranks", 1) > 1:
        return _run_ranks(directory, index, part, setup)
    job = _claimed(directory, index, part, setup)
    if isinstance(job, int):
        return job
    answer, seconds = _run(job)
    return _store(job, answer, seconds)


def _claimed(directory: str, index: int, part: str, setup: dict[str, Any]) -> dict[str, Any] | int:
    """What is to be run; the exit code where it is not ours (any more)."""
    root = batches.root_of(directory)
    job_id = _job_id(setup)
    noted = batches.JobIds.read(directory, index).of(index)
    if noted is None:
        # The session may have ended before it could note it, and who looks for this job needs it.
        if job_id:
            batches.write_text(directory, batches.JobIds.file(part), job_id)
    elif noted[0].isdecimal() and job_id.isdecimal() and noted[0] != job_id:
        # A controller that is too busy to answer may take a batch all the same; the session then submitted it again.
        return NOT_MINE
    path = batches.entries_of(directory)[index]
    entry = entries.read_input(path, root)
    if entry is not None and entry["batch"] != directory:
        return NOT_MINE
    ending = entries.read_ending(entries.output_of(path), root)
    if ending is not None:
        return RAISED if ending.failed else RESULT
    if entry is None and files.is_there(path):
        entry = entries.read_input(path, root)
    if entry is None:
        raise FileNotFoundError(f"the call {path} was removed, or is damaged; it can be submitted again")
    queue_id = int(job_id) if job_id.isdecimal() else job_id or None
    output = os.path.join(directory, f"output.{index}")
    return {**entry, "path": path, "root": root, "index": index, "queue_id": queue_id, "job_output": output}


def _job_id(setup: dict[str, Any]) -> str:
    """What the queuing system calls this job; empty where it does not say.

    Only its own variables count: this may be within a job of another system. Behind a dot is Torque's server.
    """
    names = setup.get("id_variables", ())
    return next((os.environ[name].partition(".")[0] for name in names if os.environ.get(name)), "")


class _Pickled:
    """Unpickles to what a pickle holds."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._data,)


def _run(job: dict[str, Any]) -> tuple[call.Answer, float]:
    if job["run_time_max"] is not None:
        # By the kernel, as the function may not let Python's threads run; SIGALRM is for nothing else by default.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=2, chain=True)  # tells where the call is before it ends
        signal.setitimer(signal.ITIMER_REAL, job["run_time_max"])
    arguments = pickle.dumps((_Pickled(job["input_args"]), _Pickled(job["input_kwargs"])))
    options = {"error_log_file": job["error_log_file"]} if job["error_log_file"] else {}
    started = time.perf_counter()
    with _no_silent_exit():
        answer = call.run(job["function"], [arguments], {"executorlib_worker_id": 0}, options, finish=False)
    seconds = time.perf_counter() - started
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.unregister(signal.SIGALRM)
    return answer, seconds


@contextlib.contextmanager
def _no_silent_exit() -> Iterator[None]:
    """Let a function that ends this process by `os._exit` not seem to have left a result: dependents would start."""
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


def _store(job: dict[str, Any], answer: call.Answer, seconds: float) -> int:
    """Put the finished entry in place of the waiting one."""
    ending = {"error": _in_band(answer.frames)} if answer.traceback else {"output": _in_band(answer.frames)}
    path = job["path"]
    entries.write_pickles(
        entries.output_of(path),
        {
            "function": job["function"],
            "input_args": job["input_args"],
            "input_kwargs": job["input_kwargs"],
            "resource_dict": job["resource_dict"],
            **ending,
            # The next one who submits the call may find what was missing.
            **({} if answer.loaded else {entries.NOT_KEPT: serialize.dumps_in_band(True)}),
            "traceback": serialize.dumps_in_band(answer.traceback),
            "runtime": serialize.dumps_in_band(seconds),
            "queue_id": serialize.dumps_in_band(job["queue_id"]),
            **_printed(job["job_output"], job["root"]),
        },
        job["root"],
    )
    entries.remove_input(path, job["root"])
    return RAISED if answer.traceback else RESULT


def _printed(path: str, root: str) -> dict[str, bytes]:
    """What this job has printed so far, for its entry: the batch directory does not last."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # whatever the function has put in their place
            stream.flush()
    try:
        # A network file system may know less of the file than this process has written.
        data = files.read(path, root, last=_PRINTED_BYTES)
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


def _in_band(frames: list[Frame]) -> bytes:
    """One pickle of what may have large buffers beside it."""
    return bytes(frames[0]) if len(frames) == 1 else serialize.dumps_in_band(serialize.loads(frames))


# What MPI libraries and launchers call a rank's number among those of its node.
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def _choose_gpus(each: int) -> None:
    """Keep this rank's part of the node's GPUs, where what started the ranks shows all of them to every one."""
    local_rank = call.first_number(_LOCAL_RANK_VARIABLES)
    if not each or local_rank is None:
        return
    for name in call.GPU_VARIABLES:
        devices = os.environ.get(name, "").split(",")
        if len(devices) > each:
            os.environ[name] = ",".join(devices[local_rank * each : (local_rank + 1) * each])


def _run_ranks(directory: str, index: int, part: str, setup: dict[str, Any]) -> int:
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
    _choose_gpus(setup["gpus_per_rank"])
    job: dict[str, Any] | int = all_ranks.bcast(_claimed(directory, index, part, setup) if rank == 0 else 0, 0)
    if isinstance(job, int):
        return job
    answer, seconds = _run(job)
    if answer.traceback:
        answer.traceback = f"on rank {rank} of {size}:\n{answer.traceback}"

    def give_up() -> None:
        _store(job, answer, seconds)
        all_ranks.Abort(RAISED)

    value = _in_band(answer.frames), answer.traceback, answer.loaded
    gathered = world.gather(all_ranks, value, give_up if answer.traceback else None)
    code = RESULT
    if gathered is not None:
        ending = next((call.Answer([data], text, loaded=loaded) for data, text, loaded in gathered if text), None)
        if ending is None:
            ending = call.Answer(serialize.dumps([pickle.loads(data) for data, _, _ in gathered]), "")
        code = _store(job, ending, seconds)
    # A rank that leaves without this takes the others along, maybe before the result is in place.
    all_ranks.Barrier()
    MPI.Finalize()
    return code
