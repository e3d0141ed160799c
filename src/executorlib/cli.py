"""The command line: `executorlib cache ls`, `show`, `rm` and `prune`.

All commands but `show` go by the names, sizes and times of files; `prune --failed` also checks whether a file has a
dataset `error`, and `prune --outdated` which versions it names, which are plain data. Only `show` unpickles anything
else. No command asks a queuing system.

The files of a call's job are in a batch directory, ``.executorlib/<batch>/`` in the cache directory: `entries` names
the `_i.h5` of each call and its index in the job array, `job_id` names the job, and ``output.<index>`` has the output
of that call's job. The last one exists from the moment the job starts.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from executorlib._version import __version__
from executorlib.cache import batch_directory, entries, trust
from executorlib.cache.scan import State, find, leftovers, remove, scan
from executorlib.keys import distributions

if TYPE_CHECKING:
    from executorlib.cache.scan import ListedEntry, ListedJob

DEFAULT_DIRECTORY = "executorlib_cache"  # the default of the cluster executors
_SETTLED_SECONDS = 60.0
_SHOWN_CHARACTERS = 1000

_SIZE_UNITS = "BKMGTP"
_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

_SHOW_WARNING = (
    "Reading an entry unpickles it, and unpickling runs whatever code the file contains: show only entries of "
    "directories whose writers you trust."
)


class CommandFailed(Exception):
    """A command cannot do what it was asked; the text says why and what to do."""


# -- commands -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; by default those of this process.

    Returns:
        The exit code: 0, or 1 if something could not be done, which standard error explains. For wrong arguments
        `SystemExit` is raised, with code 2.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # As in `ls | head`. The interpreter must not flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (CommandFailed, ImportError, OSError, ValueError) as error:
        _complain(str(error))
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="executorlib", description="Tools for executorlib.")
    parser.add_argument("--version", action="version", version=__version__)
    tools = parser.add_subparsers(metavar="TOOL", required=True)
    text = "look at and clean a cache directory"
    commands = tools.add_parser("cache", help=text, description=text).add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-d",
        "--directory",
        default=DEFAULT_DIRECTORY,
        help="the cache directory (default: %(default)s, as for the cluster executors)",
    )
    common.add_argument(
        "--json", action="store_true", help="one JSON object per line; sizes in bytes, times in seconds"
    )

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, more: str) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}. {more}"
        added = commands.add_parser(name, parents=[common], help=text, description=description)
        added.set_defaults(command=command)
        return added

    ls = add(
        "ls",
        _ls,
        "list the entries and their total",
        "ls neither reads entries nor asks a queuing system: a call is 'running' when its job has started but left no "
        "result yet, 'done' when it has returned or raised, and 'failed' when its job ended without a result.",
    )
    ls.add_argument(
        "--state", action="append", choices=get_args(State), help="only entries in this state; may be repeated"
    )
    ls.add_argument(
        "--sort",
        choices=["none", *_SORT_KEYS],
        default="none",
        help="size: largest first; age: newest first; none (default): in the order found, printed at once and not kept "
        "in memory",
    )
    ls.add_argument("--reverse", action="store_true", help="reverse the order")
    ls.add_argument("--limit", type=_count, metavar="N", help="list only the first N; the total still counts all")

    show = add("show", _show, "show the content of an entry", _SHOW_WARNING)
    show.add_argument("key", metavar="KEY", help="key of an entry, as listed by ls")
    show.add_argument(
        "--full",
        action="store_true",
        help=f"show values whole instead of cutting them after {_SHOWN_CHARACTERS} characters",
    )

    rm = add("rm", _rm, "remove entries", "A call whose entry was removed runs again when it is submitted again.")
    rm.add_argument("keys", metavar="KEY", nargs="+", help="key of an entry, as listed by ls")
    rm.add_argument("--force", action="store_true", help="also entries that wait or run; their jobs are not cancelled")

    prune = add(
        "prune",
        _prune,
        "remove entries by age and size, and the leftovers of crashed processes",
        "An entry is removed if it meets every condition given among --older-than, --larger-than, --failed and "
        "--outdated. Entries that wait or run stay unless --pending is given. Without any of these options, only "
        "leftovers are removed: temporary files and inputs of finished calls after an hour, and batch directories "
        "without waiting or running calls.",
    )
    prune.add_argument(
        "--older-than",
        type=_age,
        metavar="AGE",
        help="only entries not written to for this long: 30d, 12h (s m h d w)",
    )
    prune.add_argument(
        "--larger-than",
        type=_size,
        metavar="SIZE",
        help="only entries larger than this: 1G, 500M (K M G T are powers of 1024)",
    )
    prune.add_argument(
        "--failed",
        action="store_true",
        help="only calls that raised, or whose jobs ended without a result; opens each file",
    )
    prune.add_argument(
        "--outdated",
        action="store_true",
        help="only entries made with other versions of their distributions than those installed here; reads each file",
    )
    prune.add_argument(
        "--max-size",
        type=_size,
        metavar="SIZE",
        help="then remove the oldest entries until the rest is no larger than this",
    )
    prune.add_argument(
        "--pending", action="store_true", help="also entries that wait or run; their jobs are not cancelled"
    )
    prune.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    return parser


_SORT_KEYS: dict[str, Callable[[ListedEntry], Any]] = {
    "key": lambda entry: entry.key,
    "size": lambda entry: -entry.size,
    "age": lambda entry: -entry.modified,
    "state": lambda entry: (get_args(State).index(entry.state), entry.key),
}


def _ls(options: argparse.Namespace) -> int:
    counts: Counter[str] = Counter()
    size = 0

    def counted() -> Iterator[ListedEntry]:
        nonlocal size
        for entry in _scan(options.directory):
            if not options.state or entry.state in options.state:
                counts[entry.state] += 1
                size += entry.size
                yield entry

    key = _SORT_KEYS.get(options.sort)
    if key is None:
        if options.reverse:
            raise CommandFailed("--reverse needs an order: add --sort key, size, age or state")
        entries: Iterable[ListedEntry] = counted()
    elif options.limit is None:
        entries = sorted(counted(), key=key, reverse=options.reverse)
    else:
        first = heapq.nlargest if options.reverse else heapq.nsmallest
        entries = first(options.limit, counted(), key=key)
    now = time.time()
    for number, entry in enumerate(entries):
        if options.limit is None or number < options.limit:
            _print_entry(entry, now, options.json)
    if not options.json:
        _print(f"{_entries_and_size(sum(counts.values()), size)}{_states(counts)}")
    return 0


def _show(options: argparse.Namespace) -> int:
    found = _find(options.directory, options.key)
    if found is None:
        raise CommandFailed(_no_entry(options.directory, options.key))
    entry, job = found
    shown = _entry_as_json(entry, time.time())
    if job:
        shown |= {"job": job.name, "job_output": job.output}
    values = entries.read_entry(entry.path, options.directory) if entry.state != "failed" else {}
    if values is None:
        raise CommandFailed(
            f"{entry.path} cannot be read; a warning above says why. If a module is missing, run `python -m "
            "executorlib cache show` in the folder of that module, with the Python that has the packages the call "
            "used; if the file is damaged, remove it with `executorlib cache rm`"
        )
    limit = None if options.full else _SHOWN_CHARACTERS
    for name, value in values.items():
        if name == "function":
            shown[name] = _name_of(value)
        elif name == "input_args":
            shown[name] = [_repr(each, limit) for each in value]
        elif name == "input_kwargs":
            shown[name] = {str(key): _repr(each, limit) for key, each in value.items()}
        elif name in ("runtime", "queue_id", "resource_dict", "error_log_file", "traceback", "printed", "versions"):
            shown[name] = value
        else:
            shown[name] = _repr(value, limit)
    if options.json:
        _print_json(shown)
        return 0
    shown |= {"size": _human_size(entry.size), "age": _human_age(shown["age"])}
    if isinstance(shown.get("runtime"), float):
        shown["runtime"] = f"{shown['runtime']:.3g} s"
    for name, value in shown.items():
        if name == "input_args":
            _print_fields(name, [f"[{index}] {each}" for index, each in enumerate(value)])
        elif name == "input_kwargs":
            _print_fields(name, [f"{key} = {each}" for key, each in value.items()])
        elif name == "versions" and isinstance(value, dict):
            _print_fields(name, [_version(*each) for each in sorted(value.items())])
        elif name == "resource_dict" and isinstance(value, dict):
            _print_fields(name, [f"{key} = {_repr(each, limit)}" for key, each in value.items()])
        elif value not in (None, ""):
            _print_fields(name, [_printable(line) for line in str(value).splitlines()])
    if entry.state == "failed":
        _print("Its job ended without a result; job_output is what it printed. Submit the call again to run it again.")
    return 0


def _rm(options: argparse.Namespace) -> int:
    removed: list[ListedEntry] = []
    failures = 0
    for key in dict.fromkeys(options.keys):
        try:
            found = _find(options.directory, key)
        except ValueError as error:
            problem = str(error)
        else:
            if found is None:
                problem = _no_entry(options.directory, key)
            elif found[0].state in ("waiting", "running") and not options.force:
                problem = (
                    f"the entry {key!r} is {found[0].state}: cancel its job with terminate_task_in_cache() in Python, "
                    "which also removes the entry, or add --force to remove only its files"
                )
            else:
                removed.append(found[0])
                continue
        _complain(problem)
        failures += 1
    remove(options.directory, removed)
    now = time.time()
    for entry in removed:
        if options.json:
            _print_json({"removed": entry.path, **_entry_as_json(entry, now)})
        else:
            _print(f"removed {_printable(entry.key)}")
    return 1 if failures else 0


def _prune(options: argparse.Namespace) -> int:
    now = time.time()
    entries = _chosen(options, now)
    counts: Counter[str] = Counter(entry.state for entry in entries)
    size = sum(entry.size for entry in entries)
    if not options.dry_run:
        remove(options.directory, entries)
    rest = list(leftovers(options.directory, _SETTLED_SECONDS if options.older_than is None else options.older_than))
    for left in () if options.dry_run else rest:
        if left.kind == "batch directory":
            batch_directory.remove(left.path)
        else:
            trust.remove(left.path, options.directory)
    if not options.dry_run:
        batch_directory.remove_folder(options.directory)
    if options.json:
        word = "would_remove" if options.dry_run else "removed"
        for entry in entries:
            _print_json({word: entry.path, "kind": "entry", **_entry_as_json(entry, now)})
        for left in rest:
            _print_json({word: left.path, "kind": left.kind, "size": left.size})
        return 0
    if options.dry_run:
        for entry in entries:
            _print_entry(entry, now, False)
        for left in rest:
            _print(f"{left.kind:<18}  {_human_size(left.size):>6}  {_printable(left.path)}")
    total = size + sum(left.size for left in rest)
    kinds = Counter(left.kind for left in rest)
    # "3 leftovers: 1 temporary file(s), 2 inputs"
    parts = [f"{kind}: {count}" for kind, count in sorted(kinds.items())]
    _print(
        f"{'would remove' if options.dry_run else 'removed'} {_entries_and_size(len(entries), size)}{_states(counts)}; "
        f"leftovers: {len(rest)}{' (' + ', '.join(parts) + ')' if parts else ''}; {_human_size(total)} in all"
    )
    return 0


def _chosen(options: argparse.Namespace, now: float) -> list[ListedEntry]:
    """Choose what `prune` removes: first by the conditions given, then the oldest of the others."""
    conditions: list[Callable[[ListedEntry], bool]] = []
    if options.older_than is not None:
        conditions.append(lambda entry: now - entry.modified > options.older_than)
    if options.larger_than is not None:
        conditions.append(lambda entry: entry.size > options.larger_than)
    if options.failed:
        conditions.append(lambda entry: entry.state == "failed" or (entry.state == "done" and _raised(entry)))
    if options.outdated:
        conditions.append(lambda entry: entry.state == "done" and _is_outdated(entry, options.directory))
    chosen: list[ListedEntry] = []
    rest: list[ListedEntry] = []
    size = 0
    for entry in _scan(options.directory):
        removable = options.pending or entry.state in ("done", "failed")
        if removable and conditions and all(condition(entry) for condition in conditions):
            chosen.append(entry)
        else:
            size += entry.size
            if removable and options.max_size is not None:
                rest.append(entry)
    if options.max_size is not None:
        rest.sort(key=lambda entry: entry.modified)
        for entry in rest:
            if size <= options.max_size:
                break
            chosen.append(entry)
            size -= entry.size
        if size > options.max_size:
            _complain(
                f"{_human_size(size)} remain, all in entries that wait or run; add --pending to remove those, too"
            )
    return chosen


def _version(name: str, version: str) -> str:
    here = distributions.installed(name)
    return _printable(f"{name} {version}" + ("" if here in (None, version) else f" (installed here: {here})"))


def _is_outdated(entry: ListedEntry, directory: str) -> bool:
    versions = entries.versions_of(entry.path, directory)
    return bool(distributions.others(versions, {name: distributions.installed(name) for name in versions}))


def _raised(entry: ListedEntry) -> bool:
    return "error" in entries.datasets_of(entry.path)  # nothing is known about a link or a stranger's file


def _scan(directory: str) -> Iterator[ListedEntry]:
    try:
        with trust.opened(directory):
            yield from scan(directory)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommandFailed(_no_directory(directory)) from error


def _find(directory: str, key: str) -> tuple[ListedEntry, ListedJob | None] | None:
    try:
        with trust.opened(directory):
            return find(directory, key)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommandFailed(_no_directory(directory)) from error


def _no_directory(directory: str) -> str:
    return f"there is no directory {directory}; name the executor's cache_directory with --directory"


def _no_entry(directory: str, key: str) -> str:
    return f"{directory} has no entry {key!r}; `executorlib cache ls -d {directory}` lists its entries"


# -- printing and parsing -----------------------------------------------------------------------------------------


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


def _print_json(value: dict[str, Any]) -> None:
    _print(json.dumps(value, default=repr))


def _print_entry(entry: ListedEntry, now: float, as_json: bool) -> None:
    if as_json:
        _print_json(_entry_as_json(entry, now))
    else:
        age = _human_age(now - entry.modified)
        _print(f"{entry.state:<7}  {_human_size(entry.size):>6}  {age:>4}  {_printable(entry.key)}")


def _print_fields(name: str, lines: list[str]) -> None:
    for line in lines or ["none"]:
        _print(f"{name + ':' if name else '':<15} {line}")
        name = ""


def _entry_as_json(entry: ListedEntry, now: float) -> dict[str, Any]:
    age = max(0.0, now - entry.modified)
    return {"key": entry.key, "state": entry.state, "size": entry.size, "age": age, "file": entry.path}


def _entries_and_size(count: int, size: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}, {_human_size(size)}"


def _states(counts: Counter[str]) -> str:
    parts = [f"{counts[state]} {state}" for state in get_args(State) if counts[state]]
    return f" ({', '.join(parts)})" if parts else ""


def _complain(problem: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"executorlib: {problem}\n")


def _name_of(function: Any) -> str:
    if hasattr(function, "__qualname__"):
        return f"{getattr(function, '__module__', None)}.{function.__qualname__}"
    return _repr(function, _SHOWN_CHARACTERS)


def _repr(value: Any, limit: int | None) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr() raised {type(error).__name__}>"
    return text if limit is None or len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _printable(text: str) -> str:
    """Escape characters that would act on the terminal: anybody may have named the files."""
    return text if text.isprintable() else repr(text)[1:-1]


def _human_size(size: float) -> str:
    unit = 0
    while size >= 1000 and unit < len(_SIZE_UNITS) - 1:
        size /= 1024
        unit += 1
    digits = 1 if unit and size < 9.95 else 0
    return f"{size:.{digits}f}{_SIZE_UNITS[unit]}"


def _human_age(seconds: float) -> str:
    for unit, following in (("s", "m"), ("m", "h"), ("h", "d")):
        if seconds < 2 * _AGE_UNITS[following]:
            return f"{max(0, int(seconds / _AGE_UNITS[unit]))}{unit}"
    return f"{int(seconds / _AGE_UNITS['d'])}d"


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGTP])(?:i?B)?|B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a number and K, M, G or T, such as 1.5G")
    return int(float(match[1]) * 1024 ** _SIZE_UNITS.index((match[2] or "B").upper()))


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write a number and s, m, h, d or w, such as 30d")
    return float(match[1]) * _AGE_UNITS[match[2].lower()]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of entries")
    return int(text)
