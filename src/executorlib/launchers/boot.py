"""How a new interpreter is started that runs a module of ours and sees the user's path."""

from __future__ import annotations

import sys

from executorlib.launchers.session import interpreter

# Characters of source in one argument, which has up to 128 KiB (Linux's MAX_ARG_STRLEN); one takes four bytes at most.
_PIECE = 30_000


def boot_command(module: str, call: str, rank: bool = False) -> list[str]:
    """The command that runs ``module.call`` in a new interpreter, with this process's import path and arguments.

    A user's arguments, such as the names of thousands of files, may be more than Linux takes as one argument. In pieces
    they fit, as they did when this process was started, and there is no file that another node would have to see.

    Args:
        module: The module.
        call: The arguments, in brackets.
        rank: Whether it is one of a world's ranks, which are told the arguments in their setup: Open MPI's mpiexec puts
            all of a command into one environment variable, which has the same limit.
    """
    code = boot_code(module, call, [""] if rank else arguments())
    if len(code) <= _PIECE:
        return [*interpreter(), "-c", code]
    pieces = [code[start : start + _PIECE] for start in range(0, len(code), _PIECE)]
    return [*interpreter(), "-c", "import sys; exec(''.join(sys.argv[1:]))", *pieces]


def boot_code(module: str, call: str, argv: list[str]) -> str:
    """Python source that runs ``module.call`` with this process's import path and with these arguments.

    The path is set before anything is imported, so that no file in the working directory takes a module's place.
    Two braces that open, which only stand in texts here, are written in another way: Flux's shell fills in templates
    (``{{id}}``) in commands.
    """
    code = f"import sys; sys.path[:] = {import_path()!r}; sys.argv[:] = {argv!r}; from {module} import main; main{call}"
    return code.replace("{{", r"{\x7b")


def boot_file(module: str, call: str) -> str:
    """The same, for a file that is run: what `multiprocessing` starts from there reads that file again."""
    return f"if __name__ == '__main__':\n    {boot_code(module, call, arguments())}\n"


def import_path() -> list[str]:
    """This process's `sys.path`."""
    return [str(entry) for entry in sys.path]


def arguments() -> list[str]:
    """This process's `sys.argv`, which a spawned Python may lack."""
    return [str(argument) for argument in getattr(sys, "argv", [])]
