"""Carries calls and results between the executor and its workers."""

# The environment variable that tells a worker how to connect. It is here because this module loads nothing else.
CONNECTION_VARIABLE = "EXECUTORLIB_CONNECTION"
