"""The command line, as ``python -m executorlib``."""

from __future__ import annotations

import sys

from executorlib.cli import main

sys.exit(main())
