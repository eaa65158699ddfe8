"""Trains a dense MLA transformer, its lightning indexer, and both through the selection.

`train.run.Run` takes a `train.settings.RunConfig` from its first step to its last; `python -m train` (or `dsa-train`)
is the command around it; `train.planner` says what a step needs before there is a machine.
"""
