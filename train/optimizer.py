"""One optax chain a parameter group: clip by the group's own norm, then AdamW or Muon."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from dsa_jax.stacks import is_stack
from train.checks import check_integer, check_number, shown
from train.moments import store_rounded

# Axes (reduction, output) of the matrices that Muon orthogonalises, counted from the end: leading axes (layers,
# experts) are batches of matrices, and a head axis is folded into the side it stands on. The router is left to AdamW.
MATRICES = {
    "q_a_proj": (-2, -1),
    "q_b_proj": (-3, (-2, -1)),
    "kv_a_proj_with_mqa": (-2, -1),
    "kv_b_proj": (-3, (-2, -1)),
    "o_proj": ((-3, -2), -1),
    "wq_b": (-3, (-2, -1)),
    "wk": (-2, -1),
    "weights_proj": (-2, -1),
    "gate_proj": (-2, -1),
    "up_proj": (-2, -1),
    "down_proj": (-2, -1),
    "eh_proj": (-2, -1),
}


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Holds the settings of AdamW at `learning_rate`; `muon_learning_rate` hands the layers' matrices to Muon.

    With `moment_dtype="bfloat16"` the moments of both take half the memory. They are rounded stochastically.

    Examples:
      >>> settings = OptimizerSettings(learning_rate=4e-3, muon_learning_rate=0.02, schedule="cosine")

    Raises:
      ValueError: naming the field, if a schedule is not known or a number is not finite or out of range.
    """

    learning_rate: float
    muon_learning_rate: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {shown(self.schedule)}")
        if self.moment_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"moment_dtype must be 'float32' or 'bfloat16', got {shown(self.moment_dtype)}")
        for name in ("learning_rate", "clip"):
            check_number(name, getattr(self, name), above=0)
        if self.muon_learning_rate is not None:
            check_number("muon_learning_rate", self.muon_learning_rate, above=0)
        check_integer("warmup_steps", self.warmup_steps, least=0)
        for name in ("b1", "b2"):
            check_number(name, getattr(self, name), least=0, below=1)
        check_number("weight_decay", self.weight_decay, least=0)


def make_schedule(
    peak: float, settings: OptimizerSettings, steps: int, scale: optax.Schedule | None = None
) -> optax.Schedule:
    """Makes a linear warm-up to `peak` at step `warmup_steps`, then a constant, or a cosine to zero at step `steps`.

    Args:
      peak: the rate that all others are parts of.
      settings: the shape of the schedule.
      steps: of the phase.
      scale: a factor on every step's rate, as `stage_scale` makes it.
    """
    warmup = settings.warmup_steps
    if settings.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)  # the first step already moves
    whole = after if warmup == 0 else optax.join_schedules([ramp, after], [warmup])
    return whole if scale is None else lambda step: scale(step) * whole(step)


def stage_scale(stages: Sequence[tuple[int, Sequence[float]]]) -> optax.Schedule | None:
    """Makes the factor on a phase's rates: linear in each stage, from its first step to its last.

    Args:
      stages: the steps of each stage, and the factors at its first and at its last step; a single step has the first.

    Returns:
      the schedule, None where all factors are 1.
    """
    if all(factor == 1 for _, factors in stages for factor in factors):
        return None
    steps, factors, begin = [], [], 0
    for count, (first, last) in stages:
        steps += [begin, begin + count - 1][:count]
        factors += [first, last][:count]
        begin += count
    return lambda step: jnp.interp(step, jnp.asarray(steps, jnp.float32), jnp.asarray(factors, jnp.float32))


def learning_rates(
    settings: OptimizerSettings, steps: int, scale: optax.Schedule | None = None
) -> dict[str, optax.Schedule]:
    """Gives the schedules of one parameter group by the settings' names: AdamW's, and Muon's if it is used."""
    peaks = {"learning_rate": settings.learning_rate, "muon_learning_rate": settings.muon_learning_rate}
    return {name: make_schedule(peak, settings, steps, scale) for name, peak in peaks.items() if peak is not None}


def make_optimizer(
    settings: OptimizerSettings, steps: int, scale: optax.Schedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes the chain of one parameter group over a phase of `steps` steps, with a factor on its rates.

    Returns:
      the optimizer. Where its moments are bfloat16 its `update` needs `random` and `step`, as `moments.store_rounded`
      says; elsewhere they are ignored.
    """
    rates = learning_rates(settings, steps, scale)
    adam_rate, muon_rate = rates["learning_rate"], rates.get("muon_learning_rate")
    if muon_rate is None:
        inner = optax.adamw(
            adam_rate, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay, mask=decay_mask
        )
    else:
        muon = optax.contrib.muon(
            muon_rate,
            weight_decay=settings.weight_decay,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            adam_weight_decay=settings.weight_decay,
            adam_learning_rate=adam_rate,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        inner = _spare_normalisations(muon)
    chain = optax.chain(optax.clip_by_global_norm(settings.clip), inner)
    return optax.with_extra_args_support(chain) if settings.moment_dtype == "float32" else store_rounded(chain)


def _spare_normalisations(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows zeros to a transformation instead of what does not decay: optax's Muon has no mask for its AdamW part."""

    def update(updates, state, params=None):
        shown = jax.tree.map(lambda decays, x: x if decays else jnp.zeros_like(x), decay_mask(params), params)
        return inner.update(updates, state, shown)

    return optax.GradientTransformation(inner.init, update)


def muon_dimensions(params: Any) -> Any:
    """Makes the tree of `MuonDimensionNumbers`, None where a parameter is AdamW's."""

    def dimensions(path, leaf):
        names = [str(getattr(key, "key", "")) for key in path]
        in_layer = any(map(is_stack, names))
        axes = MATRICES.get(names[-1]) if in_layer else None
        return None if axes is None else MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def decay_mask(params: Any) -> Any:
    """Marks the parameters that decay: everywhere but in the normalisations."""

    def decays(path, leaf):
        return not any(str(getattr(key, "key", "")).endswith("norm") for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)
