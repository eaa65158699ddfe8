"""Says how the layers are stacked: what is stored side by side and scanned together, and which of them select.

Layers of a kind stand in one stack where all have an indexer of their own. Where some reuse the selection of an earlier
layer, a stack is a whole number of periods of that pattern, and an irregular pattern is cut into few stacks.
"""

import dataclasses
import functools
from collections.abc import Sequence

from dsa_jax.config import Config

MAX_PERIOD = 16  # layers that one scanned body holds, at most
PREDICTION_LAYERS = "prediction_layers"  # the stack of the layers past the last
# Of layers, by what the names of stacks begin with: dense and MoE are the feed-forwards of the model's own layers.
KINDS = {"dense_layers": "dense", "moe_layers": "MoE", PREDICTION_LAYERS: "prediction"}


@dataclasses.dataclass(frozen=True)
class StackedLayers:
    """Describes one stack: layers of one kind of feed-forward, `repeats` periods of one pattern.

    Attributes:
      name: the stack's attribute of `Transformer`, and hence the first name of its parameters' paths.
      moe: whether its feed-forward routes to experts.
      first: the number of its first layer.
      period: for each layer of a period whether it has an indexer; the others reuse the selection before them.
      repeats: how many periods it holds.
      first_indexer: how many layers before it have an indexer.
      hands_on: whether the next stack begins with a layer that reuses this one's last selection.
    """

    name: str
    moe: bool
    first: int
    period: tuple[bool, ...]
    repeats: int
    first_indexer: int
    hands_on: bool

    @property
    def count(self) -> int:
        """Counts the layers."""
        return len(self.period) * self.repeats

    @property
    def layers(self) -> tuple[int, ...]:
        """Lists the numbers of the layers."""
        return tuple(range(self.first, self.first + self.count))

    @property
    def indexers(self) -> tuple[int, ...]:
        """Lists the numbers of the layers that have an indexer."""
        return tuple(layer for place, layer in enumerate(self.layers) if self.period[place % len(self.period)])


def is_stack(name: str) -> bool:
    """Tells whether a name on a parameter's path is a stack's."""
    return kind_of(name) is not None


def kind_of(name: str) -> str | None:
    """Names the kind of layers, "dense", "MoE" or "prediction", of a stack; None for what is no stack's name.

    Examples:
      >>> kind_of("moe_layers_2"), kind_of("norm")
      ('MoE', None)
    """
    base, _, number = name.rpartition("_")
    return KINDS.get(base if number.isdecimal() else name)


def base_name(name: str) -> str:
    """Gives the name that the first stack of the kind has; what is no stack's name stays."""
    base, _, number = name.rpartition("_")
    return base if number.isdecimal() and base in KINDS else name


@functools.lru_cache(maxsize=64)
def stacked_layers(config: Config) -> tuple[StackedLayers, ...]:
    """Lists the stacks of a model's own layers, in their order; `prediction_stack` is another.

    Examples:
      >>> types = ("full", "full", "shared", "shared", "full", "shared")
      >>> config = Config.tiny(num_hidden_layers=6, first_k_dense_replace=2, indexer_types=types)
      >>> [(stack.name, stack.layers, stack.indexers) for stack in stacked_layers(config)][1:3]
      [('moe_layers', (2, 3), ()), ('moe_layers_1', (4, 5), (4,))]
    """
    has_indexer = [kind == "full" for kind in config.indexer_types] or [True] * config.num_hidden_layers
    dense = config.num_dense_layers
    stacks: list[StackedLayers] = []
    for base, begin, end in (("dense_layers", 0, dense), ("moe_layers", dense, config.num_hidden_layers)):
        follows = end < config.num_hidden_layers and not has_indexer[end]
        first = begin
        for number, (period, repeats) in enumerate(_cut(tuple(has_indexer[begin:end]), follows)):
            stop = first + len(period) * repeats
            stacks.append(
                StackedLayers(
                    name=base if number == 0 else f"{base}_{number}",
                    moe=base == "moe_layers",
                    first=first,
                    period=period,
                    repeats=repeats,
                    first_indexer=sum(has_indexer[:first]),
                    hands_on=stop < config.num_hidden_layers and not has_indexer[stop],
                )
            )
            first = stop
    return tuple(stacks)


def prediction_stack(config: Config) -> StackedLayers | None:
    """Describes the stack of the prediction layers, None where there are none.

    Each has an indexer, and the feed-forward of the model's last layer. They are numbered past the model's own layers,
    as their tensors and their entries in caches are.

    Examples:
      >>> prediction_stack(Config.tiny(num_nextn_predict_layers=1)).layers
      (3,)
    """
    if not config.num_nextn_predict_layers:
        return None
    return StackedLayers(
        name=PREDICTION_LAYERS,
        moe=config.num_moe_layers > 0,
        first=config.num_hidden_layers,
        period=(True,),
        repeats=config.num_nextn_predict_layers,
        first_indexer=config.num_index_layers,
        hands_on=False,
    )


def all_stacks(config: Config) -> tuple[StackedLayers, ...]:
    """Lists the stacks of a model, that of its prediction layers last, if there are any."""
    predicting = prediction_stack(config)
    return stacked_layers(config) if predicting is None else (*stacked_layers(config), predicting)


def leaders(config: Config) -> tuple[int, ...]:
    """Lists for each layer the number of the layer whose indexer selects for it.

    Examples:
      >>> leaders(Config.tiny(num_hidden_layers=4, indexer_types=("full", "shared", "shared", "full")))
      (0, 0, 0, 3)
    """
    found: list[int] = []
    for layer in range(config.num_hidden_layers):
        shared = bool(config.indexer_types) and config.indexer_types[layer] == "shared"
        found.append(found[-1] if shared else layer)
    return tuple(found)


def kl_shares(config: Config) -> tuple[float, ...]:
    """Lists for each layer the share of its divergence in the indexers' loss.

    The layers that an indexer selects for share one, unless `index_share_kl` has it learn from its own layer alone.

    Examples:
      >>> kl_shares(Config.tiny(num_hidden_layers=3, indexer_types=("full", "shared", "full")))
      (0.5, 0.5, 1.0)
    """
    found = leaders(config)
    if config.index_share_kl == "own":
        return tuple(float(leader == layer) for layer, leader in enumerate(found))
    return tuple(1 / found.count(leader) for leader in found)


def _cut(has_indexer: tuple[bool, ...], follows: bool) -> list[tuple[tuple[bool, ...], int]]:
    """Cuts a pattern into periods and their repeats, so that the fewest layers and stacks are traced.

    A stack whose last selection goes on to the next must not repeat, unless none of its layers selects: what is handed
    from one repeat to the next would be kept for the backward pass of each. `follows` says whether it goes on to what
    comes after the pattern.
    """
    count, most = len(has_indexer), _repeats(has_indexer)
    costs: list[float] = [0.0] * (count + 1)
    chosen: list[tuple[int, int]] = [(1, 1)] * count  # from each layer on: the size of the period, and its repeats
    for begin in range(count - 1, -1, -1):
        costs[begin] = float("inf")
        for size in range(1, min(MAX_PERIOD, count - begin) + 1):
            if not has_indexer[begin] and size > 1:  # a run of layers without indexers is scanned one by one
                break
            longest = most[size][begin]
            for repeats in {longest, max(longest - 1, 1), 1}:
                stop = begin + size * repeats
                hands_on = follows if stop == count else not has_indexer[stop]
                cost = size + 1 + costs[stop]
                if not (hands_on and has_indexer[begin] and repeats > 1) and cost < costs[begin]:
                    costs[begin], chosen[begin] = cost, (size, repeats)
    pieces, begin = [], 0
    while begin < count:
        size, repeats = chosen[begin]
        pieces.append((has_indexer[begin : begin + size], repeats))
        begin += size * repeats
    return pieces


def _repeats(pattern: Sequence[bool]) -> dict[int, list[int]]:
    """Counts for each size of a period how often its entries stand from each place on, one time after the other."""
    count = len(pattern)
    found = {size: [1] * count for size in range(1, MAX_PERIOD + 1)}
    for size, repeats in found.items():
        for begin in range(count - 2 * size, -1, -1):
            if pattern[begin : begin + size] == pattern[begin + size : begin + 2 * size]:
                repeats[begin] = repeats[begin + size] + 1
    return found
