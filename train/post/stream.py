"""Batches of episodes that the model under training samples itself: rollouts, rewards, advantages, rows."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsa_jax.parallel.sharding import parameter_specs, place_batch, shards, spec, zigzag_order
from train.data import Batch, Replay
from train.losses import log_probabilities
from train.phases import Params, merge_groups, run_model
from train.post.environment import Episode, Task
from train.post.episodes import EpisodeStore, Stored
from train.post.objective import equal_groups, group_advantages
from train.post.policy import PolicySettings, RolloutBatch
from train.post.recorded import replay_rows
from train.post.rewards import Scores, score
from train.post.rollout import Rollouts
from train.post.rows import episode_rows

REPLAY = "replay_"  # begins the names of arrays that were recorded
KEPT = f"{REPLAY}kept"

type Score = Callable[[Batch], np.ndarray]  # log-probabilities [B, T] of the targets under weights that stay


@dataclasses.dataclass
class PolicyStream:
    """Gives the batches of a policy's stage: a stream that follows the weights.

    The episodes of a rollout lie in the store before any is trained on, and its journal says which update takes which.
    A run that is continued takes the same again.

    Args:
      sampler: plays the episodes.
      store: of the episodes.
      tasks: in turn, each as often as it stands here.
      settings: of rollouts and objective.
      batch_size: episodes of a batch.
      seq_len: tokens of a row.
      seed: decides which problems are drawn, and what is sampled.
      saved: tells the updates after which the oldest weights that are kept were saved; what only earlier ones were
        trained on is forgotten.
      reference: scores the targets for β, None without.
      teachers: by task's name what scores the targets in place of rewards; none: rewards decide.
    """

    sampler: Rollouts
    store: EpisodeStore
    tasks: Sequence[Task]
    settings: PolicySettings
    batch_size: int
    seq_len: int
    seed: int
    saved: Callable[[], int] = lambda: 0
    reference: Score | None = None
    teachers: Mapping[str, Score] = dataclasses.field(default_factory=dict)
    updates: int = 0
    _is_begun: bool = False
    _rows: tuple[int, dict[str, np.ndarray]] | None = None  # of the rollout with this number
    _measures: dict[str, float] = dataclasses.field(default_factory=dict)

    def follow(self, params: Params) -> None:
        """Takes the weights of the next batch; they sample where a rollout begins."""
        if not self._is_begun:  # a run that was killed before it saved anything begins anew, without `set_state`
            self.store.rewind(self.updates)
            self._is_begun = True
        if self.store.waiting(self.updates) < self.batch_size:
            self.sampler.update(params)

    def __next__(self) -> RolloutBatch:
        self._measures = {}
        taken = self.store.take(self.updates, self.batch_size)
        if taken is None:
            self._roll()
            taken = self.store.take(self.updates, self.batch_size)
            assert taken is not None  # a rollout has at least one batch
        number, places = taken[0].name.rollout, [each.name.place for each in taken]
        self._measures["staleness"] = float(self.updates - taken[0].episode.version)
        if self._rows is None or self._rows[0] != number:
            self._rows = number, self._make_rows(self.store.rollout(number))
        self.updates += 1
        return _rollout_batch({name: values[places] for name, values in self._rows[1].items()})

    def measures(self) -> Mapping[str, float]:
        """Gives the numbers of a rollout with its first batch, and with each how many updates old it is."""
        return self._measures

    def get_state(self) -> Any:
        """Gives how many batches were taken."""
        return {"updates": self.updates}

    def set_state(self, state: Any) -> None:
        """Continues behind that many batches; what later ones took waits again, or is sampled anew."""
        self.updates, self._rows, self._is_begun = int(state["updates"]), None, False

    def _roll(self) -> None:
        """Samples a rollout, rewards it, and stores it."""
        began = time.monotonic()
        episodes = self._sample(self.updates // self.settings.updates_per_rollout)
        seconds = {"rollout_seconds": round(time.monotonic() - began, 4)}
        scores = {task.name: score(task.rewards, _of(task, episodes)) for task in _different(self.tasks)}
        total = np.zeros(len(episodes))
        for name, each in scores.items():
            total[[i for i, episode in enumerate(episodes) if episode.task == name]] = each.total
        self.store.forget(min(self.saved(), self.updates))
        self.store.add(episodes, total.tolist())
        self._measures = numbers_of(episodes, scores) | seconds
        if not self.teachers:
            size, counted = self.settings.num_generations, np.isfinite(total)
            equal = equal_groups(total, size, counted=counted)
            self._measures["equal_groups"] = equal / (len(episodes) // size)

    def _sample(self, number: int) -> list[Episode]:
        settings, rows = self.settings, self.batch_size * self.settings.steps_per_generation
        count = rows // settings.num_generations
        draw = np.random.default_rng([self.seed, number])
        problems: list[tuple[Task, int]] = []
        for i in range(count):
            task = self.tasks[(number * count + i) % len(self.tasks)]
            problems.append((task, int(draw.integers(task.held_out))))
        return self.sampler.sample(
            problems,
            num_generations=settings.num_generations,
            seed=int(draw.integers(2**31)),
            version=self.updates,
            **settings.draws,
        )

    def _make_rows(self, stored: Sequence[Stored]) -> dict[str, np.ndarray]:
        """Makes the rows of a rollout, with advantages of rewards or teachers; what was dropped is not learnt."""
        episodes, total = [each.episode for each in stored], np.array([each.reward for each in stored], np.float64)
        counted = np.isfinite(total)
        arrays = episode_rows(episodes, self.seq_len) | _replayed(episodes, self.seq_len)
        arrays["valid"] = arrays["valid"] & counted[:, None]
        if self.teachers:
            arrays["advantages"] = self._teach(arrays, [episode.task for episode in episodes])
        else:
            options: dict[str, Any] = dict(scale_rewards=self.settings.scale_rewards, counted=counted)
            by_episode = group_advantages(total, self.settings.num_generations, **options)
            arrays["advantages"] = np.broadcast_to(by_episode[:, None], arrays["tokens"].shape).copy()
        if self.reference is not None:
            arrays["ref_log_probs"] = self.reference(_batch(arrays))
        return arrays

    def _teach(self, arrays: dict[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
        """Computes the advantage of each token, log π_teacher - log π_old: on average, minus the reverse KL."""
        advantages = np.zeros(arrays["tokens"].shape, np.float32)
        for name in dict.fromkeys(tasks):
            mine = np.array([task == name for task in tasks])[:, None]
            difference = self.teachers[name](_batch(arrays)) - arrays["old_log_probs"]
            advantages = np.where(mine & arrays["valid"], difference, advantages)
        return advantages


def numbers_of(episodes: Sequence[Episode], scores: Mapping[str, Scores]) -> dict[str, float]:
    """Averages what is watched of episodes, by task and over all: rewards, correct ones, tokens, errors."""
    numbers: dict[str, float] = {}
    for name, each in scores.items():
        mine = [episode for episode in episodes if episode.task == name]
        sound = [i for i, episode in enumerate(mine) if episode.ended != "error"]
        if sound:
            numbers[f"reward/{name}"] = float(each.total[sound].mean())
            numbers[f"correct/{name}"] = float(np.mean([outcome_of(mine[i], each, i) for i in sound]))
            numbers[f"output_tokens/{name}"] = float(np.mean([output_tokens(mine[i]) for i in sound]))
            numbers |= {f"{part}/{name}": float(values[sound].mean()) for part, values in each.parts.items()}
    for kind in ("reward", "correct", "output_tokens"):
        found = [value for key, value in numbers.items() if key.startswith(f"{kind}/")]
        if found:
            numbers[kind] = float(np.mean(found))
    numbers["dropped_episodes"] = float(sum(episode.ended == "error" for episode in episodes))
    numbers["cut_share"] = float(np.mean([episode.ended not in ("done", "error") for episode in episodes]))
    return numbers


def outcome_of(episode: Episode, scores: Scores, position: int) -> float:
    """Says how right an episode is: its environment's `outcome`, or the task's first reward without one."""
    outcome = getattr(episode.environment, "outcome", None)
    return float(next(iter(scores.parts.values()))[position] if outcome is None else outcome)


def output_tokens(episode: Episode) -> int:
    """Counts the tokens that the model wrote."""
    return sum(len(turn.tokens) for turn in episode.turns)


def make_score(graphdef: nnx.GraphDef, params: Params, settings: PolicySettings, mesh: Mesh | None = None) -> Score:
    """Makes what scores batches with weights that stay, on a mesh if they are there: a reference, or a teacher."""
    run = _scoring(graphdef, settings.attention, settings.temperature, mesh)
    if mesh is None:
        return lambda batch: np.asarray(run(params, batch))
    return lambda batch: _in_natural_order(run(params, place_batch(batch, mesh)), mesh)


def _in_natural_order(values: jax.Array, mesh: Mesh) -> np.ndarray:
    order = zigzag_order(values.shape[1], shards(mesh, "sequence"))
    return np.asarray(values)[:, np.argsort(order)]


@functools.lru_cache(maxsize=8)
def _scoring(
    graphdef: nnx.GraphDef, attention: Any, temperature: float, mesh: Mesh | None
) -> Callable[[Params, Batch], jax.Array]:
    def run(params: Params, batch: Batch) -> jax.Array:
        model = merge_groups(graphdef, params)
        output = run_model(model, batch, attention=attention)
        return log_probabilities(model, output, batch, temperature=temperature)

    if mesh is None:
        return jax.jit(run)
    token = spec("batch", "sequence")

    def on_shards(params: Params, batch: Batch) -> jax.Array:
        specs = parameter_specs(params), token
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=token, check_vma=False)(params, batch)

    return jax.jit(on_shards)


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    """Makes the batch that other weights score: of what was recorded, the kept sets alone hold for them."""
    plain = {field.name: arrays[field.name] for field in dataclasses.fields(Batch) if field.name in arrays}
    return Batch(**plain, replay=Replay(kept=arrays[KEPT]) if KEPT in arrays else None)


def _rollout_batch(arrays: dict[str, np.ndarray]) -> RolloutBatch:
    recorded = {name.removeprefix(REPLAY): x for name, x in arrays.items() if name.startswith(REPLAY)}
    others = {name: x for name, x in arrays.items() if not name.startswith(REPLAY)}
    return RolloutBatch(**others, replay=Replay(**recorded) if recorded else None)


def _replayed(episodes: Sequence[Episode], seq_len: int) -> dict[str, np.ndarray]:
    """Makes the rows of what was recorded; of an episode without turns nothing was, and nothing counts."""
    found = [i for i, episode in enumerate(episodes) if episode.recorded is not None]
    rows = replay_rows([episodes[i] for i in found], seq_len) if found else {}
    arrays = {}
    for name, values in rows.items():
        arrays[f"{REPLAY}{name}"] = whole = np.full((len(episodes), *values.shape[1:]), -1, values.dtype)
        whole[found] = values
    return arrays


def _of(task: Task, episodes: Sequence[Episode]) -> list[Episode]:
    return [episode for episode in episodes if episode.task == task.name]


def _different(tasks: Sequence[Task]) -> list[Task]:
    return list({task.name: task for task in tasks}.values())
