"""Rollouts: many episodes at once on one paged cache, turn by turn, with the weights that are being trained.

Episodes sit in a fixed number of rows. In each round the rows read what is new to them, a prompt or an answer, draw
their turns on the device in one program, and the environments answer; who ends makes room for the next episode. The
prompt of a group is read once, and its pages are shared.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from dsa_jax import PagedCache, Runner, Transformer
from dsa_jax.inference.programs import bucket
from dsa_jax.inference.turns import Turns
from dsa_jax.layers import Attention
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import shards
from train.checks import check_integer, check_number
from train.phases import Params, merge_groups
from train.post.environment import Episode
from train.post.playing import Draws, Play, Problem, Text
from train.post.recorded import Recording

ROWS = 64  # episodes at once, on each shard of rows
MAX_KEPT = 512  # ids of a kept set where top-p alone truncates: top_k is set to it, so that no set is wider


class Rollouts:
    """Plays episodes with the weights that it was last given, on one device or on the mesh that they are trained on.

    Args:
      graphdef: the model's definition.
      text: texts as tokens.
      seq_len: tokens of an episode at most, its prompt among them.
      attention: "sparse" or "dense".
      rows: episodes at once, on each shard of rows, at most; calls with fewer episodes have fewer, a power of two.
      record: what is recorded of each episode.
      cache_format: "float32", "bfloat16" or "fp8"; the model's compute dtype if None.
      mesh: the devices that the weights are on; one if None.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        text: Text,
        seq_len: int,
        attention: Attention = "sparse",
        *,
        rows: int = ROWS,
        record: Recording = Recording(),  # noqa: B008
        cache_format: str | None = None,
        mesh: Mesh | None = None,
    ):
        check_integer("rows", rows)
        check_integer("seq_len", seq_len, least=2)
        self.graphdef, self.text, self.seq_len = graphdef, text, seq_len
        self.attention: Attention = attention
        self.record, self.cache_format, self.mesh = record, cache_format, mesh
        self.row_shards = shards(mesh, "rows")
        self.rows = rows * self.row_shards
        self.updates = 0  # how often weights were handed over
        self._runner: Runner | None = None
        self._turns: dict[int, Turns] = {}

    def update(self, params: Params | Transformer) -> None:
        """Takes other weights; nothing passes the host. On one device they are used where they lie, without a copy.

        A training step that takes them over (donates them) ends their use here: hand over the next before sampling.

        Raises:
          ValueError: for weights of another model.
        """
        model = params if isinstance(params, Transformer) else merge_groups(self.graphdef, params)
        if self._runner is None:
            self._runner = self._make_runner(model)
        else:
            self._runner.replace_parameters(model)
        self.updates += 1

    def _make_runner(self, model: Transformer) -> Runner:
        config = model.config
        if self.seq_len > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"seq_len must be at most max_position_embeddings = {limit}, got {self.seq_len}")
        if self.attention == "dense" and self.record.selections:
            raise ValueError("selections are recorded of attention 'sparse': dense attention selects nothing")
        page_shards = shards(self.mesh, "pages")
        pages = self.rows // self.row_shards * math.ceil(math.ceil(self.seq_len / PAGE) / page_shards)
        cache = PagedCache(config, pages, format=self.cache_format or config.dtype, mesh=self.mesh)
        return Runner(
            model,
            cache,
            attention=self.attention,
            max_length=self.seq_len,
            return_selected=self.record.selections,
            return_routed=self.record.routes,
        )

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        num_generations: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int,
        episode_seconds: float = math.inf,
        version: int = 0,
    ) -> list[Episode]:
        """Plays `num_generations` episodes of every problem, those of one problem adjacent.

        An episode ends for one of the reasons of `Episode.ended`. "error" stands where an environment raised, answered
        something else than a `Step`, or the model's logits were NaN; "full" where the sequence left no room to go
        on, or none at all, and then there are no turns; "tokens" at the completion's limit. `error` says more.

        Args:
          problems: tasks, and the numbers of their problems.
          num_generations: episodes of each.
          max_completion_length: tokens of all turns and all answers of an episode together.
          temperature, top_p, top_k: as engines take them; a top_k of 0 keeps all. Where kept sets are recorded, top_p
            alone keeps at most `MAX_KEPT` tokens.
          seed: decides what is drawn: episode i draws the same whatever is played beside it.
          episode_seconds: of each episode, from its environment's making on.
          version: is written into the episodes.

        Raises:
          ValueError: for settings out of their ranges, or without weights.
        """
        check_integer("num_generations", num_generations)
        draws = self._draws(max_completion_length, temperature, top_p, top_k, seed, episode_seconds)
        names = [(task, number) for task, number in problems for _ in range(num_generations)]
        queue = collections.deque(enumerate(names))
        episodes: list[Episode | None] = [None] * len(names)
        turns = self.turns(min(draws.most, self.seq_len))
        # No more rows than episodes: of those that nobody sits in everything is computed as well.
        rows = min(self.rows // self.row_shards, bucket(-(-len(names) // self.row_shards)))
        places = rows * self.row_shards
        options: dict[str, Any] = dict(seq_len=self.seq_len, record=self.record, version=version)
        play = Play(turns, self.text, draws, rows=places, **options)
        try:
            while queue or play.live:
                for index, episode in play.round(queue):
                    episodes[index] = episode
        finally:
            play.clear()
        return [episode for episode in episodes if episode is not None]

    @property
    def runner(self) -> Runner:
        """The runner over the cache that all episodes share.

        Raises:
          ValueError: without weights, or if a training step has taken them over.
        """
        if self._runner is None:
            raise ValueError("rollouts need weights: call update(params) first")
        if any(getattr(x, "is_deleted", bool)() for x in self._runner.parameters):
            raise ValueError("a training step has taken over the weights of the rollouts: call update(params) again")
        return self._runner

    def turns(self, most: int) -> Turns:
        """Gives what draws turns of so many tokens at most."""
        if most not in self._turns:
            self._turns[most] = Turns(self.runner, most=most, stops=[self.text.end_id])
        return self._turns[most]

    def _draws(self, most, temperature, top_p, top_k, seed, seconds) -> Draws:
        """Checks how tokens are to be drawn; where kept sets are recorded, no set may be wider than a bound."""
        check_integer("max_completion_length", most)
        check_number("temperature", temperature, least=0)
        check_number("top_p", top_p, above=0)
        check_integer("top_k", top_k, least=0)
        check_integer("seed", seed, least=0)
        if top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {top_p}")
        if not seconds > 0:
            raise ValueError(f"episode_seconds must be above 0, got {seconds}")
        vocab = self.runner.config.vocab_size
        k = min(top_k or (MAX_KEPT if self.record.kept and top_p < 1 else vocab), vocab)
        lists = self.record.kept and temperature > 0 and (top_p < 1 or k < vocab)
        return Draws(temperature, top_p, k, seed, lists, seconds, most)


def rollout(rollouts: Rollouts, problems: Sequence[Problem], **options: Any) -> list[Episode]:
    """Plays episodes of problems: `Rollouts.sample` as a function."""
    return rollouts.sample(problems, **options)


def count_ended(episodes: Iterable[Episode]) -> dict[str, int]:
    """Counts episodes by why they ended."""
    return dict(collections.Counter(episode.ended for episode in episodes))
