"""Both Flux executors on a real instance: calls get the resources they ask for, and errors name the cause."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from contract.functions import Gate, add, append, lines, until, wait_for, wait_until_gone
from executorlib import FluxClusterExecutor, FluxJobExecutor, get_future_from_cache, terminate_tasks_in_cache
from executorlib.api import ExecutorlibSocketError
from executorlib.flux.instance import FluxInstance
from executorlib.launchers.contract import Events
from executorlib.poller import Poller
from on_flux.functions import (
    GPU_VARIABLES,
    about_job,
    active_jobs,
    arguments,
    calls_in_an_instance_of_its_own,
    die_on_a_rank,
    gather_nodes,
    jobs,
    leave_and_die,
    my_job,
    print_much_and_die,
    printed,
    rank_of_world,
    say,
    say_and_die,
    variables,
)

WAIT = 40
# Of tests that start instances of their own, and for one in them.
LONG_SECONDS, LONG_WAIT = 240, 150
pytestmark = pytest.mark.flux
both = pytest.mark.rows("flux", "flux-cluster")
BATCH_TEMPLATE = "#!/bin/bash\n{{command}}\n"


def job_of(held: Gate) -> str:
    """The job in which a call waits at a gate."""
    environ = Path(f"/proc/{held.pid()}/environ").read_bytes().split(b"\0")
    (number,) = [entry.partition(b"=")[2] for entry in environ if entry.startswith(b"FLUX_JOB_ID=")]
    return number.decode()


# -- what a call asks for -----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("resource_dict", "fields", "expected"),
    [
        ({}, "{nnodes} {ncores} {ntasks} {urgency} {duration}", ["1", "1", "1", "16", "0.0"]),
        ({"threads_per_core": 3}, "{ncores} {ntasks}", ["3", "1"]),
        ({"exclusive": True}, "{nnodes} {ncores}", ["1", "4"]),
        ({"priority": 5}, "{urgency}", ["21"]),
        ({"priority": -100}, "{urgency}", ["1"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_calls_get_the_resources_they_ask_for(
    make_executor: Callable[..., Any], resource_dict: dict[str, Any], fields: str, expected: list[str]
) -> None:
    with make_executor() as executor:
        assert executor.submit(my_job, fields, resource_dict=resource_dict).result(WAIT) == expected


@both
def test_flux_knows_the_time_limit(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        (duration,) = executor.submit(my_job, "{duration}", resource_dict={"run_time_max": 50}).result(WAIT)
    assert float(duration) >= 50


@both
def test_the_gpus_that_a_call_sees_are_its_own(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    with make_executor() as executor:
        assert executor.submit(variables, "CUDA_VISIBLE_DEVICES").result(WAIT) == ["-1"]
        one = executor.submit(variables, *GPU_VARIABLES, resource_dict={"gpus_per_core": 1}).result(WAIT)
        # Resources are no part of a call's key: another order makes it another call.
        two = executor.submit(variables, *GPU_VARIABLES[::-1], resource_dict={"gpus_per_core": 2}).result(WAIT)
    assert one in [["0", "0"], ["1", "1"]]
    assert two == ["0,1", "0,1"]


@both
@pytest.mark.mpi
def test_ranks_are_one_world_with_gpus_of_their_own(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        ranks = executor.submit(rank_of_world, 0, resource_dict={"cores": 2, "gpus_per_core": 1}).result(WAIT)
    assert [(rank, size) for rank, size, _ in ranks] == [(0, 2), (1, 2)]
    assert sorted(gpus[0] for _, _, gpus in ranks) == ["0", "1"]


@both
@pytest.mark.mpi
def test_ranks_on_several_nodes(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        found = executor.submit(gather_nodes, 0, resource_dict={"cores": 3, "num_nodes": 3}).result(WAIT)
    assert found[0] == sorted(set(found[0]))
    assert found == [found[0]] * 3


@both
@pytest.mark.mpi
def test_ranks_that_do_not_find_each_other_are_named(make_executor: Callable[..., Any]) -> None:
    """Without PMI each would be a world of its own, and the results wrong."""
    with make_executor(pmi_mode="off") as executor:
        error = executor.submit(rank_of_world, 0, resource_dict={"cores": 2}).exception(WAIT)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    assert "world of size 1" in str(error)
    assert "pmi" in str(error)


@both
def test_requests_beyond_the_instance_are_errors_at_submit(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        for resource_dict in (
            {"threads_per_core": 5},
            {"gpus_per_core": 3},
            {"cores": 17},
            {"cores": 5, "num_nodes": 5},
        ):
            with pytest.raises(ValueError, match="Flux instance has 4 nodes of at most 4 cores and 2 GPUs"):
                executor.submit(add, 1, 2, resource_dict=resource_dict)


@both
@pytest.mark.parametrize("key", ["slurm_cmd_args", "openmpi_oversubscribe"])
def test_keys_that_flux_cannot_honour(make_executor: Callable[..., Any], key: str) -> None:
    value: Any = ["--exclusive"] if key == "slurm_cmd_args" else True
    with make_executor() as executor, pytest.raises(ValueError, match=key):
        executor.submit(add, 1, 2, resource_dict={key: value})


# -- how calls end ------------------------------------------------------------------------------------------------


@both
def test_a_job_that_somebody_cancels(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor() as executor:
        future = executor.submit(held, 1)
        subprocess.run(["flux", "cancel", job_of(held)], check=True)
        error = future.exception(WAIT)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    assert isinstance(error, ExecutorlibSocketError)
    assert "CANCELED" in str(error)


@pytest.mark.rows("flux")
def test_a_process_that_dies_has_last_words(executor: Any) -> None:
    error = executor.submit(say_and_die).exception(WAIT)
    assert isinstance(error, ExecutorlibSocketError)
    for part in ("SIGKILL", "last words", "Flux job f"):
        assert part in str(error)


@pytest.mark.rows("flux")
def test_flux_ends_calls_that_their_worker_cannot_end(
    make_executor: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    """A stopped worker answers nobody. Flux's own limit, a little later, is not even needed."""
    with make_executor() as executor:
        future = executor.submit(time.sleep, 60, resource_dict={"run_time_max": 0.5})
        assert isinstance(future.exception(WAIT), TimeoutError)


@pytest.mark.rows("flux")
def test_a_queued_call_is_cancelled_in_flux(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor(max_workers=6) as executor:
        blockers = [executor.submit(held, i, resource_dict={"exclusive": True}) for i in range(4)]
        held.pids(4)
        queued = executor.submit(add, 1, 2, resource_dict={"exclusive": True})
        until(lambda: active_jobs("add"), WAIT)
        (number,) = active_jobs("add")
        assert queued.cancel()
        until(lambda: about_job(number, "{status}") == ["CANCELED"], WAIT)
        held.open()
        assert [future.result(WAIT) for future in blockers] == [0, 1, 2, 3]


def program(folder: Path, source: str) -> Path:
    path = folder / "program.py"
    path.write_text(
        "import os, signal, subprocess, sys, time\n"
        "from executorlib import FluxClusterExecutor, FluxJobExecutor\n" + textwrap.dedent(source)
    )
    return path


@pytest.mark.parametrize("name", ["FluxJobExecutor", "FluxClusterExecutor"])
def test_an_instance_that_goes_away(tmp_path: Path, name: str) -> None:
    """Whatever is killed, every future resolves."""
    path = program(
        tmp_path,
        f"""
        def begin(seconds):
            with open("begun.draft", "w") as file:
                file.write(str(os.getpid()))
            os.rename("begun.draft", "begun")
            give_up = time.monotonic() + seconds
            while time.monotonic() < give_up:
                time.sleep(0.01)

        executor = {name}()
        running = executor.submit(begin, 30)
        waiting = executor.submit(abs, running)
        while not os.path.exists("begun"):
            time.sleep(0.01)
        import flux
        os.kill(int(flux.Flux().attr_get("broker.pid")), signal.SIGKILL)
        errors = [future.exception(30) for future in (running, waiting)]
        executor.shutdown()
        with open("errors.draft", "w") as file:
            file.write("\\n".join(f"{{type(error).__name__}} {{error}}" for error in errors))
        os.rename("errors.draft", "errors")
        """,
    )
    subprocess.run(
        ["flux", "start", sys.executable, str(path)], cwd=tmp_path, capture_output=True, timeout=WAIT, check=False
    )
    first, *_ = wait_for(tmp_path / "errors", WAIT).splitlines()
    # It is said that the call can be submitted again, so nobody may go on with it.
    wait_until_gone(int(wait_for(tmp_path / "begun")), seconds=WAIT)
    assert first.startswith("ExecutorlibSocketError")
    assert "Flux" in first


@pytest.mark.parametrize("name", ["FluxJobExecutor", "FluxClusterExecutor"])
def test_no_instance_is_an_error_at_construction(tmp_path: Path, name: str) -> None:
    path = program(
        tmp_path,
        f"""
        try:
            {name}()
        except RuntimeError as error:
            print(error)
        """,
    )
    environ = {**os.environ, "FLUX_URI": "local:///nowhere/local-0"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=WAIT, check=True
    )
    assert "FLUX_URI=local:///nowhere/local-0" in done.stdout
    assert "flux start" in done.stdout


@both
def test_leftover_processes_end_with_their_call(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    """A process in a session of its own holds up neither the call nor its job, and the call's end is reported."""
    with make_executor() as executor:
        path = str(tmp_path / "left")
        error = executor.submit(leave_and_die, path, resource_dict={"job_name": "leaves"}).exception(WAIT)
        left = int(wait_for(path))
        wait_until_gone(left, seconds=WAIT)
        until(lambda: not active_jobs("leaves"), WAIT)
    assert isinstance(error, ExecutorlibSocketError)
    assert "code 3" in str(error)


def shell_of(pid: int) -> int:
    """Flux's shell among the ancestors of a process."""
    while b"flux-shell" not in Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


@pytest.mark.rows("flux", "block-flux", "flux-cluster")
def test_a_shell_that_dies_takes_its_call_along(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor() as executor:
        future = executor.submit(held, 1)
        pid = held.pid()
        os.kill(shell_of(pid), signal.SIGKILL)
        assert isinstance(future.exception(WAIT), ExecutorlibSocketError)
        wait_until_gone(pid, seconds=WAIT)


@pytest.mark.timeout(LONG_SECONDS)
def test_the_broker_of_a_scripts_own_instance_takes_its_call_along(tmp_path: Path, gate: Callable[..., Gate]) -> None:
    """The script is still there then."""
    held = gate()
    with FluxClusterExecutor(cache_directory=str(tmp_path)) as executor:
        future = executor.submit(held, 1, resource_dict={"submission_template": BATCH_TEMPLATE})
        pid = held.pids(1, LONG_WAIT)[0]
        uri = next(
            entry.removeprefix(b"FLUX_URI=").decode()
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if entry.startswith(b"FLUX_URI=")
        )
        broker = subprocess.run(
            ["flux", "getattr", "broker.pid"], env={**os.environ, "FLUX_URI": uri}, capture_output=True, check=True
        )
        os.kill(int(broker.stdout), signal.SIGKILL)
        wait_until_gone(pid, seconds=WAIT)
        assert isinstance(future.exception(WAIT), ExecutorlibSocketError)


@both
@pytest.mark.mpi
def test_a_rank_that_dies_ends_the_others(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        error = executor.submit(die_on_a_rank, 1, resource_dict={"cores": 2}).exception(WAIT)
    assert isinstance(error, ExecutorlibSocketError)
    assert "task rank 1" in str(error)


@both
def test_environment_variable_that_is_not_text(
    make_executor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flux cannot pass it on, so it arrives in another way."""
    monkeypatch.setenv("RAW", os.fsdecode(b"caf\xe9"))
    with make_executor() as executor:
        assert executor.submit(variables, "RAW").result(WAIT) == [os.fsdecode(b"caf\xe9")]


@both
def test_working_directory_that_is_not_text(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with make_executor() as executor:
        error = executor.submit(add, 1, 2, resource_dict={"cwd": str(folder)}).exception(WAIT)
    assert "caf\\udce9' is not" in str(error)


@pytest.mark.rows("flux", "block-flux", "flux-cluster")
@pytest.mark.parametrize("text", ["{{id}}", "{{tmpdir}}/x", "{{" + "a" * 2000 + "}}"], ids=["id", "folder", "long"])
def test_arguments_are_no_templates(
    make_executor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["program.py", text])
    with make_executor() as executor:
        assert executor.submit(arguments).result(WAIT) == ["program.py", text]


@contextlib.contextmanager
def another_instance(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """An instance beside the one of the tests; the file ``uri`` in the folder says where it is."""
    # Its program ends with its input, even if the broker is killed.
    script = f"echo $FLUX_URI > '{folder}/uri.draft'; mv '{folder}/uri.draft' '{folder}/uri'; exec cat"
    command = ["flux", "start", *options, "bash", "-c", script]
    nowhere = subprocess.DEVNULL
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere)
    assert started.stdin is not None
    try:
        yield started
    finally:
        started.stdin.close()
        if started.poll() is None:
            started.terminate()
        started.wait(WAIT)


@pytest.mark.timeout(LONG_SECONDS)
@pytest.mark.parametrize("name", ["FluxJobExecutor", "FluxClusterExecutor"])
def test_calls_while_the_instance_is_shut_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Flux unloads its modules one by one. Whichever a call meets, its future resolves."""
    with another_instance(tmp_path) as instance:
        monkeypatch.setenv("FLUX_URI", wait_for(tmp_path / "uri", WAIT).strip())
        options = {"cache_directory": str(tmp_path / "store")} if name == "FluxClusterExecutor" else {}
        with {"FluxJobExecutor": FluxJobExecutor, "FluxClusterExecutor": FluxClusterExecutor}[name](**options) as one:
            futures = [one.submit(add, 0, 1)]
            assert futures[0].result(WAIT) == 1
            with subprocess.Popen(
                ["flux", "shutdown", "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ):
                while instance.poll() is None:
                    futures.append(one.submit(add, len(futures), 1))
                    concurrent.futures.wait(futures[-1:], 0.2)
            futures.append(one.submit(add, len(futures), 1))
            _, waiting = concurrent.futures.wait(futures, WAIT)
            assert not waiting
            assert isinstance(futures[-1].exception(), ExecutorlibSocketError)
            assert "Flux" in str(futures[-1].exception())


@pytest.mark.timeout(LONG_SECONDS)
@pytest.mark.parametrize("ended", ["SIGSTOP", "SIGKILL"])
def test_questions_that_stay_without_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str) -> None:
    """They do not keep the connection open; the leak guard of all tests would find it."""
    monkeypatch.setattr("executorlib.flux.instance._CLOSE_SECONDS", 0.0)
    events, answers, lost = Poller(), [], []
    with another_instance(tmp_path) as broker:
        monkeypatch.setenv("FLUX_URI", wait_for(tmp_path / "uri", WAIT).strip())
        instance = FluxInstance(cast(Events, events), lost.append)
        instance.open()
        broker.send_signal(signal.SIGSTOP)
        try:
            instance.submit({}, 16, answers.append)
            instance.watch(1, lambda event, context: answers.append(event))
            if ended == "SIGKILL":
                broker.kill()
                while not lost:
                    events.call_back(events.poll(WAIT))
            instance.close()
        finally:
            broker.kill()
        events.close_poll()
    assert [str(answer) for answer in answers] == ([lost[0], ""] if lost else [])


QUEUES = """\
[resource]
noverify = true
[[resource.config]]
hosts = "node[0-1]"
cores = "0-3"
properties = ["few"]
[queues.debug]
requires = ["few"]
policy.limits.duration = "5m"
[queues.long]
"""


@pytest.mark.timeout(LONG_SECONDS)
def test_an_instance_with_queues_and_limits(tmp_path: Path) -> None:
    (tmp_path / "queues.toml").write_text(QUEUES)
    path = program(
        tmp_path,
        """
        def duration(command):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

        fields = ["flux", "jobs", "--no-header", "--format={queue} {duration}"]

        def about(number):
            return duration([*fields, os.environ["FLUX_JOB_ID"]])

        subprocess.run(["flux", "queue", "start", "--all", "--quiet"], check=True)
        subprocess.run(["flux", "queue", "enable", "--all", "--quiet"], check=True)
        for make in (FluxJobExecutor, lambda: FluxClusterExecutor(cache_directory="store")):
            with make() as executor:
                print(executor.submit(about, 0, resource_dict={"queue": "debug"}).result())
                print(executor.submit(about, 1, resource_dict={"partition": "debug", "run_time_max": 290}).result())
                print(executor.submit(about, 2, resource_dict={"queue": "long"}).result())
                for refused in ({"priority": 1}, {"queue": "no_such"}, {"queue": "debug", "run_time_max": 301}):
                    try:
                        executor.submit(abs, 3, resource_dict=refused)
                    except ValueError as error:
                        print(error)
                print(executor.submit(abs, 4).exception())
        with FluxJobExecutor(block_allocation=True, max_workers=1, resource_dict={"queue": "debug"}) as executor:
            print(executor.submit(about, 5).result())
        """,
    )
    command = ["flux", "start", "--test-size=2", "--test-hosts=node[0-1]", f"--config-path={tmp_path}/queues.toml"]
    done = subprocess.run(
        [*command, sys.executable, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG_WAIT,
        check=True,
    )
    said = done.stdout.splitlines()
    assert len(said) == 2 * 7 + 1, done.stdout
    for each in (said[:7], said[7:14]):
        assert each[:3] == ["['debug', '300.0']", "['debug', '300.0']", "['long', '0.0']"]
        for text in (each[3], each[4], each[6]):
            assert "debug, long" in text
        assert "limit of 300 s" in each[5]
    assert said[14] == "['debug', '300.0']"


# -- FluxJobExecutor ----------------------------------------------------------------------------------------------


@pytest.mark.rows("flux")
def test_a_key_that_flux_has_no_use_for(executor: Any) -> None:
    with pytest.raises(ValueError, match="memory_max"):
        executor.submit(add, 1, 2, resource_dict={"memory_max": 4})


@pytest.mark.timeout(LONG_SECONDS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_call_that_succeeds_is_a_job_that_does(nested: bool) -> None:
    """It ends by itself, even if that takes as long as the shutdown of an instance."""
    name = f"succeeds{nested}"
    with FluxJobExecutor(flux_executor_nesting=nested) as executor:
        assert executor.submit(add, 1, 2, resource_dict={"job_name": name}).result(LONG_WAIT) == 3
    (number,) = jobs(name)
    until(lambda: about_job(number, "{status}") == ["COMPLETED"], WAIT)


@pytest.mark.rows("flux")
@pytest.mark.parametrize("size", [0, 20_000, 1_000_000])
def test_last_words_after_much_output(executor: Any, size: int) -> None:
    """Only standard error is reported, and its end always is."""
    text = str(executor.submit(print_much_and_die, size).exception(WAIT))
    assert "code 4" in text
    assert text.rstrip().endswith("last words")
    assert "oooo" not in text


def test_jobs_of_a_client_that_was_killed(tmp_path: Path) -> None:
    """Waiting jobs notice when they start that their client is gone, and do not try for long."""
    path = program(
        tmp_path,
        """
        def begin(number):
            open(f"begun{number}", "w").close()
            time.sleep(100)

        needs = {"exclusive": True, "job_name": "killed client"}
        with FluxJobExecutor(max_workers=8) as executor:
            futures = [executor.submit(begin, number, resource_dict=needs) for number in range(8)]
            futures[0].result()
        """,
    )
    with subprocess.Popen([sys.executable, str(path)], cwd=tmp_path) as client:
        try:
            until(lambda: len(active_jobs("killed client")) == 8 and len(list(tmp_path.glob("begun*"))) == 4, WAIT)
        finally:
            client.kill()
    until(lambda: not active_jobs("killed client"), WAIT)
    assert len(list(tmp_path.glob("begun*"))) == 4


@pytest.mark.rows("flux")
def test_each_call_is_a_job_with_its_name(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor() as executor:
        assert executor.info["nodes"]["node3"] == {"cores": 4, "gpus": 2}
        futures = [executor.submit(held, i) for i in range(2)]
        assert len({job_of(held) for _ in held.pids(2)}) >= 1
        assert about_job(job_of(held), "{status} {name}")[0] == "RUN"
        held.open()
        assert [future.result(WAIT) for future in futures] == [0, 1]


@pytest.mark.rows("flux", "block-flux")
def test_an_instance_for_each_call(make_executor: Callable[..., Any], row: Any) -> None:
    options = {"resource_dict": {"threads_per_core": 2}} if row.block else {}
    with make_executor(flux_executor_nesting=True, **options) as executor:
        more = {} if row.block else {"resource_dict": {"threads_per_core": 2}}
        result, cores, uri = executor.submit(calls_in_an_instance_of_its_own, -3, **more).result(WAIT)
    assert result == 3
    assert uri != os.environ["FLUX_URI"]
    assert cores == 2


@pytest.mark.mpi
@pytest.mark.rows("flux")
def test_ranks_in_an_instance_of_their_own(make_executor: Callable[..., Any]) -> None:
    with make_executor(flux_executor_nesting=True) as executor:
        ranks = executor.submit(rank_of_world, 0, resource_dict={"cores": 2}).result(WAIT)
    assert [(rank, size) for rank, size, _ in ranks] == [(0, 2), (1, 2)]


@pytest.mark.rows("flux", "block-flux")
def test_the_users_own_flux_executor_submits(make_executor: Callable[..., Any]) -> None:
    import flux.job

    submitted = []

    class Counting(flux.job.FluxExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            submitted.append(args)
            return super().submit(*args, **kwargs)

    with Counting() as flux_executor:
        with make_executor(flux_executor=flux_executor) as executor:
            assert [future.result(WAIT) for future in [executor.submit(add, i, 1) for i in range(3)]] == [1, 2, 3]
        assert submitted
        flux_executor.shutdown()
        with make_executor(flux_executor=flux_executor) as executor:
            assert "shutdown" in str(executor.submit(add, 1, 2).exception(WAIT))


def test_object_that_is_not_a_flux_executor() -> None:
    with pytest.raises(TypeError, match="flux_executor"):
        FluxJobExecutor(flux_executor=object())


@pytest.mark.rows("flux", "block-flux", "block-flux-cluster")
def test_output_of_calls_is_kept_by_flux(make_executor: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    with make_executor(max_workers=1) as executor:
        numbers = {executor.submit(say, f"I am call {i}").result(WAIT) for i in range(3)}
    assert "I am" not in capfd.readouterr().out
    assert sorted(line for number in numbers for line in printed(number)) == [f"I am call {i}" for i in range(3)]


def test_log_files(tmp_path: Path) -> None:
    with FluxJobExecutor(flux_log_files=True, resource_dict={"cwd": str(tmp_path)}) as executor:
        executor.submit(print, "to a file").result(WAIT)
        error = executor.submit(say_and_die).exception(WAIT)
    assert "last words" in str(error)
    texts = [path.read_text() for path in tmp_path.glob("flux_f*.out")]
    assert "to a file\n" in texts


# -- FluxClusterExecutor ------------------------------------------------------------------------------------------


def note(path: str, line: str) -> str:
    append(path, line)
    return line


def test_leaving_and_coming_back(tmp_path: Path, gate: Callable[..., Gate]) -> None:
    """A call and its dependent go on without the session. Another session finds both and runs neither."""
    held = gate()
    store, notes = str(tmp_path / "store"), str(tmp_path / "notes")

    def submit(executor: Any) -> Any:
        first = executor.submit(held, "a", resource_dict={"cache_key": "first"})
        return executor.submit(note, notes, first, resource_dict={"cache_key": "second"})

    executor = FluxClusterExecutor(cache_directory=store)
    left = submit(executor)
    held.pid()
    executor.shutdown(wait=False)
    assert left.cancelled() or left.exception is not None
    following = get_future_from_cache(store, "second")
    assert not following.done()
    with FluxClusterExecutor(cache_directory=store) as again:
        joined = submit(again)
        held.open()
        assert joined.result(WAIT) == "a"
    assert lines(notes) == ["a"]
    assert get_future_from_cache(store, "second").result(WAIT) == "a"


def test_a_call_of_an_instance_that_is_gone_runs_again(tmp_path: Path) -> None:
    """Jobs end with their instance, so nobody else would ever run this one."""
    path = program(
        tmp_path,
        """
        subprocess.run(["flux", "queue", "stop", "--all", "--quiet"], check=True)
        executor = FluxClusterExecutor(cache_directory="store")
        executor.submit(os.getenv, "NO_SUCH_VARIABLE", "there", resource_dict={"cache_key": "left"})
        executor.shutdown(wait=False)
        """,
    )
    command = ["flux", "start", sys.executable, str(path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=WAIT, check=True)
    assert (tmp_path / "store" / "left_i.h5").exists()
    with FluxClusterExecutor(cache_directory=str(tmp_path / "store")) as executor:
        again = executor.submit(os.getenv, "NO_SUCH_VARIABLE", "here", resource_dict={"cache_key": "left"})
        assert again.result(WAIT) == "here"


def test_jobs_of_a_cache_directory_are_cancelled(tmp_path: Path, gate: Callable[..., Gate]) -> None:
    held = gate()
    store = tmp_path / "store"
    executor = FluxClusterExecutor(cache_directory=str(store))
    executor.submit(held, 1)
    number = job_of(held)
    executor.shutdown(wait=False)
    terminate_tasks_in_cache(str(store), backend="flux")
    until(lambda: about_job(number, "{status}") == ["CANCELED"], WAIT)
    assert list(store.glob("*_i.h5")) == []


def test_a_script_of_the_calls_own_runs_in_an_instance_of_its_own(tmp_path: Path) -> None:
    with FluxClusterExecutor(cache_directory=str(tmp_path)) as executor:
        future = executor.submit(
            calls_in_an_instance_of_its_own,
            -3,
            resource_dict={"submission_template": BATCH_TEMPLATE, "threads_per_core": 2},
        )
        result, cores, uri = future.result(WAIT)
    assert (result, cores) == (3, 2)
    assert uri != os.environ["FLUX_URI"]


@pytest.mark.mpi
def test_ranks_in_a_script(tmp_path: Path) -> None:
    with FluxClusterExecutor(cache_directory=str(tmp_path)) as executor:
        resource_dict = {"submission_template": BATCH_TEMPLATE, "cores": 2}
        ranks = executor.submit(rank_of_world, 0, resource_dict=resource_dict).result(WAIT)
    assert [(rank, size) for rank, size, _ in ranks] == [(0, 2), (1, 2)]


def test_a_configuration_of_pysqa(tmp_path: Path) -> None:
    folder = tmp_path / "queues"
    folder.mkdir()
    (folder / "queue.yaml").write_text(
        "queue_type: FLUX\nqueue_primary: flux\nqueues:\n"
        "  flux: {cores_max: 4, cores_min: 1, run_time_max: 3600, script: flux.sh}\n"
    )
    (folder / "flux.sh").write_text("#!/bin/bash\n# flux: --nslots={{cores}}\n# flux: --job-name=ours\n{{command}}\n")
    with FluxClusterExecutor(cache_directory=str(tmp_path / "store"), pysqa_config_directory=str(folder)) as executor:
        assert executor.submit(variables, "NOTHING_SUCH").result(WAIT) == [None]


def test_a_template_that_cannot_be_rendered(tmp_path: Path) -> None:
    with FluxClusterExecutor(cache_directory=str(tmp_path)) as executor:
        error = executor.submit(add, 1, 2, resource_dict={"submission_template": "{{ 1 / 0 }}"}).exception(WAIT)
    assert "submission_template" in str(error)


def test_unused_keys_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "executorlib"),
        FluxClusterExecutor(cache_directory=str(tmp_path)) as executor,
    ):
        executor.submit(add, 1, 2, resource_dict={"memory_max": 4, "job_name": "mine"}).result(WAIT)
    assert "memory_max" in caplog.text
    assert "job_name" not in caplog.text
    assert len(jobs("mine")) == 1


# -- Flux inside Slurm --------------------------------------------------------------------------------------------
