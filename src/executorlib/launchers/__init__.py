"""The contract of launchers, and parts to build one from. The launchers themselves are with their executors."""
