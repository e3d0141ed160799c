"""`SingleNodeExecutor`: workers are processes of this machine."""
