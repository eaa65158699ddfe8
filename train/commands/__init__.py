"""The commands of `python -m train` that train and evaluate, and what all commands share."""
