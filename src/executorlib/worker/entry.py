"""A call's entry in the cache, begun in the process that runs the call, before it runs.

The key by which a session has looked a call up is that of what the session held then. What runs is what was pickled
later, with modules that were imported later still, and any of it may have changed in between. So the key is derived
here again, from exactly what was unpickled and is about to run, and the result is stored under that key and no other:
what runs and what its key says are the same.

Loaded by workers of executors that keep results, and ahead of the calls where workers are forked.
"""

from __future__ import annotations

from executorlib.cache import entries
from executorlib.keys import fingerprint, sources
from executorlib.worker.call import bounded, named_inputs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from executorlib.serialize import Frame

sources.remember()

# After so many calls of a function, all releases of Python have specialised its code.
_REHEARSALS = 10


class Entry:
    """A call's entry, made before anything of the call is unpickled.

    Args:
        wanted: What the executor has sent of it: ``path``, its file; ``key``, the `fingerprint.Key` by which it was
            looked up, less its sources, or None where the user has named it; ``resources``.
        function: The pickled function.
        known: The sources of the key.
        init: The key of the init function that this worker has run, if any.
        whole: Whether it is written here, and not only its key told.

    Attributes:
        name: The key of what is about to run; empty where the user has named the entry.
        problem: Why it cannot be kept; empty if it can.
    """

    def __init__(
        self,
        wanted: dict[str, Any],
        function: Frame,
        known: bytes,
        init: fingerprint.Key | None = None,
        whole: bool = True,
    ) -> None:
        self._path: str = wanted["path"]
        self._key = fingerprint.Key(*wanted["key"])._replace(sources=known) if wanted["key"] else None
        self._resources: dict[str, Any] = wanted["resources"]
        self._function = function
        self._init = init
        self._whole = whole
        self._versions: dict[str, str] | None = None
        self.name = ""
        self.problem = ""
        if self._key is not None:
            fingerprint.prepare(self._key)

    def begin(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in what is about to run; its function may change its arguments, and itself."""
        if self.problem:
            return
        try:
            if self._key is not None:
                inputs = named_inputs(kwargs, self._resources["cores"], self._init.name if self._init else "")
                key = fingerprint.recompute(self._key, fn, args, inputs)
                self.name = key.name
                self._versions = {**(self._init.versions if self._init else {}), **key.versions}
            if self._whole:
                self._args = entries.Snapshot.of(list(args))
                self._kwargs = entries.Snapshot.of(kwargs)
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    @property
    def path(self) -> str:
        """Its file."""
        if self._key is None or self.name == self._key.name:
            return self._path
        return entries.beside(self._path, self._key.name, self.name)

    @property
    def is_other(self) -> bool:
        """Whether something else ran than what was looked up."""
        return self._key is not None and not self.problem and self.name != self._key.name

    def store(self, result: Frame, seconds: float) -> str:
        """Write it. It is not worth losing a result over: what goes wrong is only returned as text.

        Args:
            result: The pickled result, the very bytes that are the call's answer: pickled again it might be another.
            seconds: Time in the function.
        """
        if not self.problem:
            try:
                entries.write_output(
                    self.path,
                    function=entries.Snapshot(self._function),
                    args=self._args,
                    kwargs=self._kwargs,
                    resource_dict=self._resources,
                    output=entries.Snapshot(result),
                    runtime=seconds,
                    versions=self._versions,
                    root=self._resources.get("cache_directory"),
                )
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
        if not self.problem:
            return ""
        return bounded(f"the result was not kept in the cache file {self.path}: {self.problem}")


def rehearse() -> None:
    """Do for a call what is done for each, in the agent that calls are forked from.

    What Python makes of code that runs for the first few times, and all that is looked up only once, is there for the
    calls then. They would each make it anew, in pages of memory of their own, which takes longer than all else here.
    """
    for _ in range(_REHEARSALS):
        function = eval("lambda x, y=1: x + y", {"__name__": "__main__"})
        values = {"x": 1.5, "y": [1]}
        fingerprint.recompute(fingerprint.key_of(function, (1,), values), function, (1,), values)
        entries.pack({"input_args": entries.Snapshot.of([1]), "input_kwargs": values})
