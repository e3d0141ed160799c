"""The other side: the node agent, the processes that it forks, and the ranks of an MPI world.

Nothing from the executor's side is imported here, so that a worker starts with little loaded.
"""
