"""Measures a stage: accuracy and tokens on held-out problems, and how far the indexer's choice has moved."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsa_jax.mesh_forward import forward_on_mesh
from dsa_jax.parallel.sharding import shards
from train.data import Batch
from train.phases import Params, merge_groups
from train.post.environment import Episode, Task
from train.post.policy import PolicySettings
from train.post.rewards import score
from train.post.rollout import Rollouts
from train.post.stream import outcome_of, output_tokens

OVERLAP_ROWS, OVERLAP_QUERIES = 8, 64  # on which the indexer's choice is compared
NINETY_FIVE = 1.96  # deviations on either side


def measure_task(
    sampler: Rollouts, task: Task, count: int, settings: PolicySettings, seed: int
) -> tuple[dict[str, float], list[Episode]]:
    """Samples the first `count` held-out problems once each.

    Returns:
      Means of correctness, reward, its parts and output tokens, half the width of the 95 % interval of correctness, and
      counts; and the episodes.
    """
    episodes = sampler.sample(
        [(task, task.held_out + number) for number in range(count)],
        num_generations=1,
        seed=seed,
        **settings.draws,
    )
    scores = score(task.rewards, episodes)
    sound = [i for i, episode in enumerate(episodes) if episode.ended != "error"]
    if not sound:
        raise ValueError(f"all {count} held-out episodes of task {task.name} ended with errors: {episodes[0].error}")
    right = np.array([outcome_of(episodes[i], scores, i) for i in sound])
    found = {
        "correct": float(right.mean()),
        "interval": float(NINETY_FIVE * right.std() / np.sqrt(len(right))),
        "reward": float(scores.total[sound].mean()),
        "output_tokens": float(np.mean([output_tokens(episodes[i]) for i in sound])),
        "problems": float(len(sound)),
        "dropped": float(len(episodes) - len(sound)),
        "cut": float(np.mean([episodes[i].ended != "done" for i in sound])),
    }
    return found | {f"part/{name}": float(values[sound].mean()) for name, values in scores.parts.items()}, episodes


def selection_overlap(
    graphdef: nnx.GraphDef, params: Params, start: Params, batch: Batch, mesh: Mesh | None = None
) -> float | None:
    """Computes the share of the indexer's selection that the indexer of `start` selects too, over the same backbone.

    Only queries that reach more than K keys count: the others select all. None where there is none.
    """
    count = min(OVERLAP_ROWS, len(batch.tokens))
    split = shards(mesh, "batch")
    rows = np.arange(-(-count // split) * split) % count  # a mesh takes whole multiples of its shards
    few = jax.tree.map(lambda x: np.asarray(x)[rows], batch)
    one, other = (
        np.asarray(_selected(graphdef, each, few, mesh)) for each in (params, {**params, "indexer": start["indexer"]})
    )
    k = one.shape[-1]
    reach = (few.stop - few.start)[:count]
    queries = np.argwhere(reach > k)
    if not len(queries):
        return None
    queries = queries[np.linspace(0, len(queries) - 1, min(len(queries), OVERLAP_ROWS * OVERLAP_QUERIES)).astype(int)]
    shares = [np.isin(one[layer, b, t], other[layer, b, t]).mean() for b, t in queries for layer in range(len(one))]
    return float(np.mean(shares))


def _selected(graphdef: nnx.GraphDef, params: Params, batch: Batch, mesh: Mesh | None) -> Any:
    model = merge_groups(graphdef, params)
    options: dict[str, Any] = dict(keys=batch.keys, positions=batch.positions)
    options |= dict(return_selected=True, return_indexer_kl=False)
    run = model if mesh is None else functools.partial(forward_on_mesh, model, mesh)
    return run(batch.tokens, **options).selected
