"""The dependency graph: calls that are recorded instead of run, to be drawn or exported."""
