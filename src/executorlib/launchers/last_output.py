"""The last output of processes, as a part of error texts."""

from __future__ import annotations

import re

# How much of a worker's last output on standard error is kept: it becomes part of the error text if the worker dies.
STDERR_TAIL_BYTES = 16 * 1024
# The start of a stack that `faulthandler`, which is enabled in workers, has written.
_STACK = "(most recent call first)"
# Lines of a stack that do not help users: our frames, which called their function, and loaded extension modules.
_OURS = re.compile(
    r'  File "(<string>|.*executorlib.(worker|launchers|relay|single_node|local_queue|transports).\w+\.py)", line '
)


def has_stack(stderr: bytes | bytearray) -> bool:
    """Return whether a process has written where it is, as `faulthandler` does."""
    return _STACK.encode() in stderr


def tail_text(stderr: bytes | bytearray) -> str:
    """The last lines of a process's output, indented for an error text; of a stack, the innermost calls."""
    lines = bytes(stderr).decode(errors="replace").rstrip().splitlines()
    stack = next((index for index in reversed(range(len(lines))) if _STACK in lines[index]), None)
    if stack is not None:
        calls = [line for line in lines[stack:] if not _OURS.match(line) and not line.startswith("Extension modules: ")]
        lines = [*lines[:stack][-5:], *calls[:15]]
    return "\n".join(f"    {line}" for line in lines[-20:]).rstrip()
