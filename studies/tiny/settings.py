"""The demo's run: the recipe of the preset `tiny` on text and recall episodes, half of each."""

import dataclasses

from studies.tiny.recall import RecallConfig
from train import presets
from train.settings import RunConfig

NAME = "tiny"
MAX_SECONDS, MAX_RSS_BYTES = 8 * 60.0, 4 * 2**30  # that the run of one seed promises to stay within
GAP_CLOSED = 0.5  # of the gap from the window to the oracle, that the trained indexer must close


def make_config(data: tuple[str, ...] = ()) -> RunConfig:
    """Makes the run; `data` are globs of text files, without them the standard library of the running Python."""
    return dataclasses.replace(presets.tiny(), data=RecallConfig(data=data))
