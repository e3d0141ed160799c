"""`TestClusterExecutor`: a queue of jobs on this machine, with nothing installed."""
