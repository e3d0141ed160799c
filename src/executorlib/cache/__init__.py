"""Calls and results as files: entries, batch directories, and the rules on whose files are read."""
