"""What a launcher must do, and parts to build one from; the launchers are in the rooms of their executors."""
