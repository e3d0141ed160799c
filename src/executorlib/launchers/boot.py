"""Starts new interpreters that run one of our modules and see the user's path."""

from __future__ import annotations

import sys

from executorlib.launchers.session import interpreter

# Characters of source in one argument, which may have 128 KiB (Linux's MAX_ARG_STRLEN); a character is up to 4 bytes.
_PIECE = 30_000


def boot_command(module: str, call: str, rank: bool = False) -> list[str]:
    """The command that runs ``module.call`` in a new interpreter, with this process's import path and arguments.

    A user's arguments, such as the names of thousands of files, can be longer than Linux allows for one argument. Split
    into pieces they fit, as they did when this process was started, and no file has to be visible on another node.

    Args:
        module: The module.
        call: The arguments, in brackets.
        rank: Whether it is a rank of an MPI world. Ranks get the arguments with their setup, because Open MPI's mpiexec
            puts a whole command into one environment variable, which has the same limit.
    """
    code = boot_code(module, call, [""] if rank else arguments())
    if len(code) <= _PIECE:
        return [*interpreter(), "-c", code]
    pieces = [code[start : start + _PIECE] for start in range(0, len(code), _PIECE)]
    return [*interpreter(), "-c", "import sys; exec(''.join(sys.argv[1:]))", *pieces]


def boot_code(module: str, call: str, argv: list[str]) -> str:
    """Python source that runs ``module.call`` with this process's import path and the given arguments.

    The path is set before anything is imported, so that no file in the working directory can shadow a module. Two
    opening braces, which occur only in texts here, are escaped, because Flux's shell expands templates (``{{id}}``) in
    commands.
    """
    code = f"import sys; sys.path[:] = {import_path()!r}; sys.argv[:] = {argv!r}; from {module} import main; main{call}"
    return code.replace("{{", r"{\x7b")


def boot_file(module: str, call: str) -> str:
    """The same for a script file, which `multiprocessing` reads again in the processes that it starts from there."""
    return f"if __name__ == '__main__':\n    {boot_code(module, call, arguments())}\n"


def import_path() -> list[str]:
    """This process's `sys.path`."""
    return [str(entry) for entry in sys.path]


def arguments() -> list[str]:
    """This process's `sys.argv`, which an embedded Python may lack."""
    return [str(argument) for argument in getattr(sys, "argv", [])]
