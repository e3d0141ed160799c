"""The commands of PBS Professional, as far as executorlib uses them, over jobs that are processes of this machine.

It is run as ``python -IS pretended_pbs.py FOLDER qsub ...``. All that it knows is in files of the folder. What commands
take and print is as `test_pbs` has it; what PBS refuses is refused here, too.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys

FOLDER = ""
SERVER = "pbs01"
# The last eight bits of PBS's error numbers.
UNKNOWN, FINISHED, NO_QUEUE, BAD_VALUE = 153, 35, 170, 1
LETTERS_OF_THOSE_WITH_VALUES = "jkovWJNlqrpAP"


def main() -> int:
    global FOLDER
    FOLDER, command, *arguments = sys.argv[1:]
    return COMMANDS[command](arguments)


def path(*parts):
    return os.path.join(FOLDER, ".".join(map(str, parts)))


def write(name, value):
    with open(f"{name}.draft.{os.getpid()}", "w") as file:
        json.dump(value, file)
    os.replace(f"{name}.draft.{os.getpid()}", name)


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def read(name):
    try:
        with open(name) as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def refuse(program, text, code):
    sys.stderr.write(f"{program}: {text}\n")
    return code


# qsub


def options(arguments):
    """The options of a command line, and what follows them."""
    found = {}
    while arguments and arguments[0].startswith("-"):
        letter, value, arguments = arguments[0][1], arguments[0][2:], arguments[1:]
        if letter in LETTERS_OF_THOSE_WITH_VALUES and not value:
            value, arguments = arguments[0], arguments[1:]
        elif letter not in LETTERS_OF_THOSE_WITH_VALUES + "h":
            raise ValueError(f"invalid option -- '{letter}'")
        found.setdefault(letter, []).append(value)
    return found, arguments


def qsub(arguments):
    given, (script,) = options(arguments)
    with open(script) as file:
        text = file.read()
    asked = {}
    for line in re.findall(r"^#PBS (.*)$", text, re.MULTILINE):
        for letter, values in options(shlex.split(line))[0].items():
            asked.setdefault(letter, []).extend(values)
    asked.update(given)
    if asked.get("q", ["workq"])[-1] != "workq":
        return refuse("qsub", "Unknown queue", NO_QUEUE)
    if re.search(r"[^\w.+-]", asked.get("N", ["a"])[-1]):
        return refuse("qsub", "illegally formed job name", BAD_VALUE)
    exported = [name for name in ",".join(asked.get("v", [])).split(",") if name]
    if not all(name in os.environ for name in exported):
        return refuse("qsub", "cannot send environment with the job", BAD_VALUE)
    elements = [None]
    if "J" in asked:
        range_ = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?", asked["J"][-1])
        if range_ is None or int(range_[1]) >= int(range_[2]) or "n" in asked.get("r", []):
            return refuse("qsub", "illegal -J value", BAD_VALUE)
        elements = list(range(int(range_[1]), int(range_[2]) + 1, int(range_[3] or 1)))
    after = [each.partition("@")[0] for each in asked.get("W", [""])[-1].split(":")[1:]]
    with open(path("last"), "a+") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        counter.seek(0)
        number = int(counter.read() or "1000") + 1
        counter.truncate(0)
        counter.write(str(number))
    job = {
        "asked": asked,
        "elements": elements,
        "after": after,
        "script": os.path.abspath(script),
        "environ": {name: os.environ[name] for name in exported},
    }
    write(path(number), job)
    for element in [] if "h" in asked else elements:
        begin(number, element, job)
    say(f"{number}[].{SERVER}" if "J" in asked else f"{number}.{SERVER}")
    return 0


def begin(number, element, job):
    """Have a process of its own wait for the job's inputs, run it and note how it ended."""
    lock = os.open(path(number, element, "lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # which is held until the job is over
    if os.fork():
        os.close(lock)
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    try:
        run(number, element, job)
    finally:
        os._exit(0)


def run(number, element, job):
    for each in job["after"]:
        before = int(re.match(r"\d+", each)[0])
        for other in read(path(before))["elements"]:
            with open(path(before, other, "lock")) as held:
                fcntl.flock(held, fcntl.LOCK_SH)
            if read(path(before, other, "end")).get("Exit_status") != 0:
                write(path(number, element, "end"), {"substate": 91, "comment": "Job deleted as result of dependency"})
                return
    index = {} if element is None else {"PBS_ARRAY_INDEX": str(element), "PBS_ARRAY_ID": f"{number}[].{SERVER}"}
    name = f"{number}.{SERVER}" if element is None else f"{number}[{element}].{SERVER}"
    environ = {"HOME": FOLDER, "PATH": "/usr/bin:/bin", "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": name}
    output = job["asked"]["o"][-1].replace("^array_index^", str(element))
    with open(output, "ab") as file, open(path("gate"), "a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # against qdel
        if read(path(number, element, "end")) is not None:
            return
        shell = subprocess.Popen(
            ["/bin/sh", job["script"]],
            cwd=FOLDER,
            env={**environ, **job["environ"], **index},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        write(path(number, element, "pid"), shell.pid)
        fcntl.flock(gate, fcntl.LOCK_UN)
        code = shell.wait()
    deleted = read(path(number, element, "deleted"))
    status = 271 if deleted else code if code >= 0 else 256 - code
    substate = 91 if deleted else 93 if status else 92
    write(path(number, element, "end"), {"Exit_status": status, "substate": substate})


# qstat, qselect


def state(number, element, job):
    end = read(path(number, element, "end"))
    others = [each for each in job["elements"] if read(path(number, each, "end")) is None]
    if end is not None:
        return {"job_state": "X" if others else "F", "exec_host": "node1/0", **end}
    if read(path(number, element, "pid")) is not None:
        return {"job_state": "R", "substate": 42, "exec_host": "node1/0"}
    if "h" in job["asked"]:
        return {"job_state": "H", "substate": 20, "Hold_Types": "u"}
    if job["after"]:
        return {"job_state": "H", "substate": 22, "Hold_Types": "s", "depend": "afterok:" + ":".join(job["after"])}
    return {"job_state": "Q", "substate": 10}


def known(name):
    """A job, and those of its elements that a name stands for."""
    found = re.fullmatch(r"(\d+)(?:\[(?:(\d+)(?:-(\d+))?)?\])?(?:\.\w+)?", name)
    job = None if found is None else read(path(found[1]))
    if job is None:
        return None, None, []
    if found[2] is None:
        return int(found[1]), job, job["elements"]
    chosen = range(int(found[2]), int(found[3] or found[2]) + 1)
    return int(found[1]), job, [each for each in job["elements"] if each in chosen]


def qstat(arguments):
    flags, names = [], []
    for argument in arguments:
        (flags if argument.startswith("-") or argument == "json" else names).append(argument)
    told = {"timestamp": 1764406012, "pbs_version": "23.06.06", "pbs_server": SERVER}
    code = 0
    if "-B" in flags:
        told["Server"] = {SERVER: {"server_state": "Active", "max_array_size": 10000, "job_history_enable": "True"}}
    else:
        jobs = told["Jobs"] = {}
        for name in names:
            number, job, elements = known(name)
            if not elements:
                code = refuse("qstat", f"Unknown Job Id {name}.{SERVER}", UNKNOWN)
                continue
            states = {element: state(number, element, job) for element in elements}
            if "-x" not in flags and all(each["job_state"] == "F" for each in states.values()):
                code = refuse("qstat", f"{name}.{SERVER} Job has finished, use -x or -H", FINISHED)
                continue
            if name.endswith("[]"):
                over = all(each["job_state"] == "F" for each in states.values())
                jobs[f"{number}[].{SERVER}"] = {"job_state": "F" if over else "B", "array": "True"}
            for element, each in states.items() if "-t" in flags or not name.endswith("[]") else ():
                full = f"{number}.{SERVER}" if element is None else f"{number}[{element}].{SERVER}"
                jobs[full] = {"Job_Name": job["asked"]["N"][-1], "Variable_List": job["environ"], **each}
    say(json.dumps(told, indent="\t", separators=(",", ":\t")))
    return code


def qselect(arguments):
    for name in os.listdir(FOLDER):
        job = read(path(name)) if name.isdigit() else None
        if job and any(read(path(name, element, "end")) is None for element in job["elements"]):
            say(f"{name}[].{SERVER}" if "J" in job["asked"] else f"{name}.{SERVER}")
    return 0


# qdel


def qdel(arguments):
    code = 0
    for name in arguments:
        number, _, elements = known(name)
        if not elements:
            code = refuse("qdel", f"Unknown Job Id {name}.{SERVER}", UNKNOWN)
            continue
        with open(path("gate"), "a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            going = [element for element in elements if read(path(number, element, "end")) is None]
            if not going:
                code = refuse("qdel", f"Job has finished {name}.{SERVER}", FINISHED)
            for element in going:
                write(path(number, element, "deleted"), True)
                pid = read(path(number, element, "pid"))
                if pid is None:
                    write(path(number, element, "end"), {"substate": 91, "comment": "terminated by me"})
                    continue
                for number_of_signal in (signal.SIGTERM, signal.SIGKILL):
                    try:
                        os.killpg(pid, number_of_signal)
                    except ProcessLookupError:
                        break
    return code


COMMANDS = {"qsub": qsub, "qstat": qstat, "qselect": qselect, "qdel": qdel}

if __name__ == "__main__":
    sys.exit(main())
