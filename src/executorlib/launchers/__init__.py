"""How workers are started, each way in a module of its own; `base` says what the loop expects of one."""
