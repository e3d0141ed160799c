"""Calls and results as files: entries, the directories of batches, and whose files are read."""
