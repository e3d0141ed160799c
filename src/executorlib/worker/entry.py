"""A call's entry in the cache, prepared before the call runs, in the process that runs it.

The key under which a session looked a call up describes the session's objects at that time. The call was pickled
later, with modules that were imported later still, and any of it may have changed in between. So the key is derived
here again, from exactly what was unpickled and is about to run, and the result is stored under that key and no other.
Thus the key always stands for what ran.

This module is loaded by workers of executors that keep results, and before the calls if workers are forked.
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

# After this many calls of a function, every release of Python has specialised its code.
_REHEARSALS = 10


class Entry:
    """A call's entry, made before anything of the call is unpickled.

    Args:
        wanted: What the executor sent about it: ``path``, its file; ``key``, the `fingerprint.Key` under which it was
            looked up, without its sources, or None if the user named it; ``resources``.
        function: The pickled function.
        known: The sources of the key.
        init: The key of the init function that this worker has run, if any.
        whole: True if the entry is written here; False if only its key is needed.

    Attributes:
        name: The key of what is about to run; empty if the user named the entry.
        problem: Why the entry cannot be kept; empty if it can.
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
        """Derive the key and pickle the inputs now, because the function may change its arguments and itself."""
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
        """The entry's file."""
        if self._key is None or self.name == self._key.name:
            return self._path
        return entries.beside(self._path, self._key.name, self.name)

    @property
    def is_other(self) -> bool:
        """True if something other than what was looked up ran."""
        return self._key is not None and not self.problem and self.name != self._key.name

    def store(self, result: Frame, seconds: float) -> str:
        """Write the entry. No result may be lost over it, so a failure is only returned as text.

        Args:
            result: The pickled result. These must be the bytes of the answer, because pickled again it may differ.
            seconds: The time spent in the function.
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
    """Do in the agent, from which calls are forked, what is done for each call.

    Python specialises code that has run a few times, and looks many things up only once. Calls find the outcome ready
    instead of producing it anew in their own pages of memory, which takes longer than everything else here.
    """
    for _ in range(_REHEARSALS):
        function = eval("lambda x, y=1: x + y", {"__name__": "__main__"})
        values = {"x": 1.5, "y": [1]}
        fingerprint.recompute(fingerprint.key_of(function, (1,), values), function, (1,), values)
        entries.pack({"input_args": entries.Snapshot.of([1]), "input_kwargs": values})
