"""What a run leaves in its folder and goes on from: checkpoints, settings, what has changed since."""
