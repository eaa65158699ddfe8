"""The runs of the study: which attentions are trained, how each comes to be, and for how long.

Every run sees the same rows in the same order: the short ones of BASE, then the long ones of SPARSE. Models that are
converted share the dense model's first part. WARMUP's rows, in which an indexer learns and nothing else, come beside.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dsa_jax import Config, NSASizes
from studies.needle import settings as needle
from studies.needle.scaling import Side
from studies.needle.settings import Preset
from train.optimizer import OptimizerSettings
from train.phases import BASE, DENSE_CONTROL, NATIVE, SPARSE, WARMUP, Phase
from train.settings import PhaseSettings, RunConfig, Stage

DENSE = "dense"  # what others begin with, and are compared with
SPARSE_START = dataclasses.replace(SPARSE, name="SPARSE_START", stream=BASE.stream)
NATIVE_LONG = dataclasses.replace(NATIVE, name="NATIVE_LONG", stream=SPARSE.stream)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Describes an attention and how a model comes to it.

    Attributes:
      says: what it is, in one sentence.
      first: the phase of the short rows, from random weights; without it the model begins with the dense one's after
        them.
      last: the phase of the long rows.
      baseline: as in `Config`.
      warmed: whether its indexer learns by WARMUP before the last phase.
    """

    says: str
    first: Phase | None
    last: Phase
    baseline: Literal["none", "window", "nsa"] = "none"
    warmed: bool = False

    @property
    def attention(self) -> Literal["dense", "sparse"]:
        """How it attends."""
        return self.last.attention


VARIANTS = {
    DENSE: Variant("Dense attention.", BASE, DENSE_CONTROL),
    "dsa": Variant("DSA, converted from the dense model by WARMUP and SPARSE.", None, SPARSE, warmed=True),
    "nsa": Variant("Native Sparse Attention from the start.", NATIVE, NATIVE_LONG, "nsa"),
    "nsa_converted": Variant("The same, converted from the dense model.", None, NATIVE_LONG, "nsa"),
    "dsa_start": Variant("DSA from the start, backbone and indexer together.", SPARSE_START, SPARSE),
    "window": Variant("The last K keys, from the start.", NATIVE, NATIVE_LONG, "window"),
}


def card() -> Preset:
    """Makes the study of the report: 16K tokens, each run some minutes of one H200."""
    made = needle.card()
    return dataclasses.replace(
        made,
        model=made.model | {"max_position_embeddings": 16384},
        base=(Stage(480, 32, 1024), Stage(80, 4, 8192), Stage(60, 1, 16384, rates=(1.0, 0.03))),
        warmup=(Stage(80, 1, 16384, rates=(1.0, 0.05)),),
        sparse=(Stage(80, 1, 16384, rates=(1.0, 0.05)),),
        lengths=tuple(2**i for i in range(10, 15)),
        questions=8,
    )


def small() -> Preset:
    """Makes a study of minutes on two CPU cores that shows that all of it runs: needles are not learnt in it."""
    made = needle.small()
    sizes = dict(first_k_dense_replace=0, index_topk=64, max_position_embeddings=512)
    return dataclasses.replace(
        made,
        model=made.model | sizes | {"nsa": NSASizes(compression=16, stride=8, block=16, blocks=4, window=32)},
        base=(Stage(6, 2, 512, rates=(1.0, 0.1)),),
        warmup=(Stage(3, 1, 512),),
        sparse=(Stage(3, 1, 512),),
        lengths=(512,),
        questions=1,
        loss_rows=1,
        text_bytes=6 * 10**6,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"card": card, "small": small}
TIMED = {"card": (4096, 8192, 16384, 32768, 65536), "small": (256,)}  # tokens of the rows that are timed


def make_config(preset: Preset, name: str, corpus: Path, *, seed: int) -> RunConfig:
    """Makes the run of a variant.

    Args:
      preset: its sizes.
      name: of the variant.
      corpus: the folder of the text.
      seed: of the weights and the rows.
    """
    variant, own = VARIANTS[name], needle.make_config(preset, corpus)
    base, warmup, sparse = own.phases
    phases = []
    if variant.first is not None:
        phases.append(_as(base, variant.first, warmup.indexer))
    if variant.warmed:
        phases.append(dataclasses.replace(warmup, phase=WARMUP))
    phases.append(_as(sparse, variant.last, sparse.indexer))
    model = dataclasses.replace(own.model, baseline=variant.baseline)
    return dataclasses.replace(own, model=model, phases=tuple(phases), seed=seed)


def _as(settings: PhaseSettings, phase: Phase, indexer: OptimizerSettings | None) -> PhaseSettings:
    """Gives a phase the stages and rates of another; the indexer's where it trains."""
    return dataclasses.replace(settings, phase=phase, indexer=indexer if "indexer" in phase.trains else None)


def sides(preset: Preset, longest: int) -> dict[str, Side]:
    """Lists what is timed: each attention once, however its weights came to be."""
    fields: dict[str, Any] = preset.model | {"max_position_embeddings": longest}
    config = Config(vocab_size=preset.vocabulary, **fields)
    of = lambda name: dataclasses.replace(config, baseline=VARIANTS[name].baseline)  # noqa: E731
    names = (DENSE, "dsa", "nsa", "window")
    return {name: Side(of(name), VARIANTS[name].attention, VARIANTS[name].last) for name in names}
