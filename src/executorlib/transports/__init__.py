"""How calls and results travel between the executor and its workers."""
