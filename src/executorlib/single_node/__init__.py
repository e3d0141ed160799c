"""`SingleNodeExecutor`, whose workers are processes on this machine."""
