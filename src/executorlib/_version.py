"""The version of executorlib, in its one place."""

__version__ = "2.0.0.dev0"
