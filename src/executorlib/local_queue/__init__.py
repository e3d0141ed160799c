"""`TestClusterExecutor`: a queue of jobs on this machine that needs no installation."""
