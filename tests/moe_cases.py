"""Random inputs for the tests of experts."""

import jax.numpy as jnp
import numpy as np
from cases import array


def problem(seed, tokens, slots, num_experts, dim=8, width=6, *, skew=0.0, dtype=jnp.float32):
    """Draws the arguments of `expert_ffn`; with `skew` the first experts get most tokens, the last few or none."""
    rng = np.random.default_rng(seed)
    preference = rng.gumbel(size=(tokens, num_experts)) - skew * np.arange(num_experts)
    experts = np.argsort(-preference, 1)[:, :slots].astype(np.int32)
    weights = [
        rng.standard_normal(shape) * 0.3 for shape in ((num_experts, dim, width),) * 2 + ((num_experts, width, dim),)
    ]
    arrays = [rng.standard_normal((tokens, dim)), experts, rng.uniform(0.1, 1, (tokens, slots)), *weights]
    dtypes = [dtype, jnp.int32, jnp.float32, dtype, dtype, dtype]
    return [array(x, x_dtype) for x, x_dtype in zip(arrays, dtypes, strict=True)]
