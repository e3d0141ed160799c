"""Keys of calls, and looking calls up in the cache.

The key that is derived here only serves the look-up. The call that runs is pickled later, so a result is stored under
the key that the worker derives from what it was sent (`worker.entry`).

Everything here belongs to the loop's thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

from executorlib import serialize
from executorlib.errors import CHANGED_CALL, advise_unpicklable
from executorlib.futures.inputs import misplaced
from executorlib.launchers.contract import Lifetime
from executorlib.worker.call import named_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from executorlib.cache.entries import Output
    from executorlib.core.task import Task
    from executorlib.keys.fingerprint import Key
    from executorlib.keys.sources import Reached

logger = logging.getLogger("executorlib")


class _Seen:
    """Findings about the user's code, kept from `Lookup.remember` to `Lookup.forget`.

    Attributes:
        reached: What calls reach in modules.
        init: Name of the key of the init function; empty before it is derived.
    """

    __slots__ = ("init", "reached")

    def __init__(self) -> None:
        self.reached: Reached = {}
        self.init = ""


class Lookup:
    """Derives the keys of an executor's calls, and finds their results in the cache.

    Args:
        init_function: Runs once in every worker of a block, and is a part of all keys.
        cache_versions: As in `options.Options`.
        lifetime: How long workers live.
    """

    def __init__(
        self,
        init_function: Callable[[], dict[str, Any]] | None = None,
        cache_versions: str = "warn",
        lifetime: Lifetime = Lifetime.CALL,
    ) -> None:
        self.init_function = init_function
        self._cache_versions = cache_versions
        self._lifetime = lifetime
        self._seen: _Seen | None = None
        self._changed_functions: set[str] = set()  # functions whose calls were changed between look-up and run

    def remember(self) -> None:
        """From now on, look only once at what calls reach in files."""
        self._seen = _Seen()

    def forget(self) -> None:
        """Look again from now on."""
        self._seen = None

    def close(self) -> None:
        """Let go of the user's objects."""
        self.init_function = None

    def identify(self, task: Task, directory: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Derive a call's key from its present state, and name its entry after the key.

        Args:
            task: The call.
            directory: The cache directory.
            args: Its positional arguments, as they count in the key.
            kwargs: Its keyword arguments, as they count in the key.

        Returns:
            The name of the key.

        Raises:
            TypeError: The call has no key.
            Exception: Whatever the user's objects raise while being pickled.
        """
        from executorlib.cache import entries

        key = task.key = None if task.resources.cache_key else self._key_of(task, args, kwargs)
        name = key.name if key is not None else str(task.resources.cache_key)
        task.cache_path = str(entries.entry_path(directory, name, "o"))
        return name

    def find(self, task: Task, directory: str) -> Output | None:
        """Read the result of a call that `identify` has named; None if the call has to run.

        Raises:
            ImportError: Its file needs h5py and that is missing.
            UntrustedFile: Anybody could have put the file there.
        """
        from executorlib.cache import entries
        from executorlib.keys import distributions

        assert task.cache_path is not None
        output = entries.read_output(task.cache_path, directory)
        if output is not None and task.key is not None and self._cache_versions == "warn":
            distributions.tell_of_others(output.versions, task.key.versions, directory)
        return output

    def key(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
        """Derive the key of a function with inputs.

        Raises:
            TypeError: It has none.
        """
        from executorlib.keys import fingerprint

        reached = None if self._seen is None else self._seen.reached
        return fingerprint.key_of(fn, args, kwargs, by_version=self._cache_versions == "key", reached=reached)

    def tell_of_change(self, task: Task) -> None:
        """Warn, once per function, that a call ran with other code or inputs than were looked up."""
        if task.name not in self._changed_functions:
            self._changed_functions.add(task.name)
            logger.warning("call %d of %s: %s", task.number, task.name, CHANGED_CALL)

    def _key_of(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
        assert task.fn is not None
        try:
            # Settings that change the result count, too.
            return self.key(task.fn, args, named_inputs(kwargs, task.resources.cores, self._init_name()))
        except TypeError as error:
            self._refuse_without_key(task, args, kwargs, error)

    def _init_name(self) -> str:
        """Name of the key of the init function; empty if there is none."""
        if self.init_function is None:
            return ""
        if self._seen is not None and self._seen.init:
            return self._seen.init
        try:
            name = self.key(self.init_function, (), {}).name
        except TypeError as error:
            raise TypeError(
                "the results of this executor cannot be kept in its cache_directory, because they depend on its "
                f"init_function, for which no key can be derived: {error}"
            ) from error
        if self._seen is not None:
            self._seen.init = name
        return name

    def _refuse_without_key(
        self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any], error: TypeError
    ) -> NoReturn:
        """Raise the error that says why a call has no key, and what to do."""
        call = task.fn, args, kwargs
        # Deriving a key asks objects for their pickled state, which futures and executors refuse to give.
        hidden = misplaced(*call)
        if hidden:
            raise advise_unpicklable(error, task.number, task.name, hidden)
        if not _can_be_pickled(call):  # a name for its entry would be of no use
            advice = (
                "It could not be sent to a worker either: create such objects (open files, locks, connections) inside "
                "the function instead."
            )
        elif self._lifetime is Lifetime.BLOCK:
            advice = "Calls of a block take no cache_key: avoid that object, or leave cache_directory out."
        else:
            advice = 'Name the cache entry yourself with resource_dict={"cache_key": "..."}, or avoid that object.'
        raise TypeError(f"{error} {advice}") from error.__cause__


def _can_be_pickled(obj: object) -> bool:
    try:
        serialize.dumps(obj)
    except BaseException:  # whatever the user's objects raise
        return False
    return True


class EqualCalls:
    """Calls of one executor that wait for an equal one, whose result they then find in the cache."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Task]] = {}  # by file in the cache: the call that runs, then those waiting

    def join(self, task: Task) -> bool:
        """Return whether the call waits for an equal one. If not, later ones wait for this one."""
        assert task.cache_path is not None
        equal = self._calls.setdefault(task.cache_path, [])
        equal.append(task)
        return len(equal) > 1

    def leave(self, task: Task) -> list[Task]:
        """A call is over: forget it, and return those that have waited for it."""
        path = task.cache_path or ""
        equal = self._calls.get(path)
        if not equal or equal[0] is not task:
            return []
        del self._calls[path]
        return equal[1:]
