"""How calls and results travel between the executor and its workers."""

# Name of the environment variable through which a worker learns how to connect. Here, where nothing is loaded with it.
CONNECTION_VARIABLE = "EXECUTORLIB_CONNECTION"
