"""The runs of the study: what is trained, for how long, at which rates.

Rates and lengths of BASE were found by a prototype on one H200: at 1024 tokens the answers come within some 300 steps,
at 8192 and 65536 at once, once they are known there. WARMUP needs Muon: with AdamW alone the divergence stayed at twice
as much after as many steps.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsa_jax import Config
from studies.needle.corpus import SPLITS, TOKENIZER
from studies.needle.rows import NeedleConfig
from train.optimizer import OptimizerSettings
from train.phases import BASE, SPARSE, WARMUP
from train.settings import PhaseSettings, RunConfig, Stage

VOCABULARY = 8192


@dataclasses.dataclass(frozen=True)
class Preset:
    """Describes a size of the study.

    Attributes:
      model: its fields, beside the vocabulary.
      base: the stages of the dense model.
      warmup: those in which its indexer learns.
      sparse: those through the selection, and of the controls.
      vocabulary: tokens of the tokenizer.
      lengths: tokens of the rows in which needles are asked for.
      questions: for every depth of them, at least, in every seed.
      loss_rows: held-out rows of the last length whose losses are measured, with needles and without.
      mass_rows: those for whose queries the whole attention is computed.
      generated_rows: rows whose answers are generated too.
      text_bytes: of the packages that are read, at most.
      learns: whether needles are learnt at this size.
    """

    model: dict[str, Any]
    base: tuple[Stage, ...]
    warmup: tuple[Stage, ...]
    sparse: tuple[Stage, ...]
    vocabulary: int
    lengths: tuple[int, ...]
    questions: int
    loss_rows: int = 8
    mass_rows: int = 2
    generated_rows: int = 4
    text_bytes: int = 200 * 10**6  # some 60M tokens: what BASE sees, and held-out text
    learns: bool = True


def card() -> Preset:
    """Makes the study of the report: 64K tokens, K 2048, one H200."""
    model = dict(
        hidden_size=512,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=32,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=2048,
        intermediate_size=1536,
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        rope_theta=5e5,
        rope_scaling=None,
        max_position_embeddings=65536,
        initializer_range=512**-0.5,
        dtype="bfloat16",
    )
    return Preset(
        model,
        base=(Stage(572, 64, 1024), Stage(153, 8, 8192), Stage(59, 1, 65536, rates=(1.0, 0.03))),
        warmup=(Stage(100, 1, 16384, rates=(1.0, 0.5)), Stage(16, 1, 65536, rates=(0.5, 0.05))),
        sparse=(Stage(60, 1, 65536, rates=(1.0, 0.05)),),
        vocabulary=VOCABULARY,
        lengths=tuple(2**i for i in range(10, 17)),
        questions=17,  # 51 in three seeds
    )


def long() -> Preset:
    """Makes the same continued to 128K tokens."""
    made = card()
    return dataclasses.replace(
        made,
        model=made.model | {"max_position_embeddings": 131072},
        base=(*made.base[:-1], Stage(59, 1, 65536), Stage(20, 1, 131072, rates=(1.0, 0.03))),
        warmup=(*made.warmup, Stage(8, 1, 131072, rates=(0.05, 0.02))),
        sparse=(Stage(30, 1, 131072, rates=(1.0, 0.05)),),
        lengths=(*made.lengths, 131072),
    )


def small() -> Preset:
    """Makes a study of minutes on two CPU cores that shows that all of it runs: needles are not learnt in it."""
    sizes = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        max_position_embeddings=2048,
        initializer_range=64**-0.5,
        dtype="float32",
    )
    return Preset(
        card().model | sizes,
        base=(Stage(30, 4, 256), Stage(4, 1, 2048, rates=(1.0, 0.1))),
        warmup=(Stage(6, 1, 512, rates=(1.0, 0.5)), Stage(2, 1, 2048, rates=(0.5, 0.05))),
        sparse=(Stage(4, 1, 2048, rates=(1.0, 0.05)),),
        vocabulary=2048,
        lengths=(512, 2048),
        questions=2,
        loss_rows=2,
        mass_rows=1,
        generated_rows=1,
        text_bytes=15 * 10**6,
        learns=False,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"card": card, "long": long, "small": small}


def make_config(preset: Preset, corpus: Path) -> RunConfig:
    """Makes the run of a preset on a corpus that `make_corpus` wrote.

    Args:
      preset: its sizes.
      corpus: the folder.

    Raises:
      ValueError: if a K is not below the length that is trained through the selection.
    """
    model = Config(vocab_size=preset.vocabulary, **preset.model)
    shortest = min(stage.seq_len for stage in preset.sparse)
    if model.index_topk >= shortest:
        raise ValueError(
            f"K must be below the {shortest} tokens that are trained through the selection, got {model.index_topk}"
        )
    train, held_out = (str(corpus / name) for name in SPLITS)
    return RunConfig(
        model=model,
        phases=(
            PhaseSettings(
                BASE,
                preset.base,
                backbone=_rates(4e-3, muon=0.02, ramp=ramp(20, preset.base)),
                bias_rate=1e-2,
            ),
            PhaseSettings(WARMUP, preset.warmup, indexer=_rates(5e-3, muon=0.1)),
            PhaseSettings(
                SPARSE,
                preset.sparse,
                backbone=_rates(8e-4, muon=4e-3, ramp=ramp(5, preset.sparse)),
                indexer=_rates(3e-3, ramp=ramp(5, preset.sparse)),
                bias_rate=1e-2,
            ),
        ),
        data=NeedleConfig(data=(train,), held_out_data=(held_out,), tokenizer=corpus / TOKENIZER),
        checkpoint_every=100_000,  # at the ends of phases alone: a checkpoint with moments is hundreds of megabytes
    )


def ramp(steps: int, stages: tuple[Stage, ...]) -> int:
    """Gives the steps in which a rate rises: fewer where a phase is short."""
    return min(steps, sum(stage.steps for stage in stages) // 4)


def _rates(adamw: float, *, muon: float | None = None, ramp: int = 0) -> OptimizerSettings:
    """Makes constant rates without decay; the stages bring them down."""
    return OptimizerSettings(adamw, muon_learning_rate=muon, warmup_steps=ramp, weight_decay=0.0)
