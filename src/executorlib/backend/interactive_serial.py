"""A program that runs the functions sent to it; see `executorlib.api.get_command_path`."""

from __future__ import annotations

from executorlib.api.program import serve_functions

if __name__ == "__main__":
    serve_functions()
