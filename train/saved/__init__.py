"""The folder of a run, from which it goes on: checkpoints, settings, what has changed since."""
