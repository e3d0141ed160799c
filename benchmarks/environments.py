"""A virtual environment per measured system, made once under ``.venvs/`` and used again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"

# Ours is measured from src/, so its environment holds the dependencies only.
REQUIREMENTS = {
    "ours": ["cloudpickle", "pyzmq", "numpy", "psutil"],
    "executorlib1x": ["executorlib>=1,<2", "cloudpickle", "pyzmq", "numpy", "psutil"],
    "stdlib": ["numpy", "psutil"],
    "loky": ["loky", "numpy", "psutil"],
    "parsl": ["parsl", "numpy", "psutil"],
    "dask": ["distributed", "numpy", "psutil"],
    "ray": ["ray", "numpy", "psutil"],
    "hyperqueue": ["hyperqueue", "numpy", "psutil"],
    "picture": ["matplotlib"],
}


class EnvironmentFailed(Exception):
    """A virtual environment could not be made; the text is the reason."""


def python_of(name: str) -> Path:
    """Return the interpreter of an environment, which is made if it is missing.

    Args:
        name: A key of ``REQUIREMENTS``.

    Returns:
        The path of its ``python``.

    Raises:
        EnvironmentFailed: pip could not install the requirements.
    """
    folder = VENVS / f"bench-{name}"
    python = folder / "bin" / "python"
    # Written last, so that a half-made environment, or one with other versions, is made again.
    stamp = folder / "made-for.txt"
    wanted = "\n".join([sys.version, *REQUIREMENTS[name]])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*install, *REQUIREMENTS[name]], capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise EnvironmentFailed(f"cannot be installed: {(lines or ['pip failed'])[-1]}")
    stamp.write_text(wanted)
    return python


def copy_source(folder: Path) -> Path:
    """Copy this package, so that editing it meanwhile does not mix versions; compiled, as an installed one is."""
    source = folder / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(source)], check=True)
    return source


def versions_of(name: str) -> dict[str, str]:
    """List what an environment holds.

    Args:
        name: A key of ``REQUIREMENTS``.

    Returns:
        Distribution name (lower case) to version.
    """
    code = (
        "import importlib.metadata as m, json;print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    )
    done = subprocess.run([str(python_of(name)), "-c", code], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
