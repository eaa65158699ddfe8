"""Plans serving: bytes of weights and workspace a GPU, the tokens of cache that fit, and the seconds of a decode step.

A mesh has copies of the model over `data`, sequences and experts over `expert`, and heads and widths over `tensor`. The
GPUs along `tensor` are a group: they share their sequences, and each keeps the whole cache of these, for one latent
serves all heads. Each selects for all sequences of its group, and attends with its own heads.

    seconds of a step = layers · (selection + attention) + matrices + experts + exchanges + drafting

Drafting is that of the model's prediction layers. Where something drafts, a step takes in a token of each sequence and
the drafts behind it, as the engine does. Nothing overlaps, which errs to the slow side. Launches, latency of exchanges,
norms and sampling are left out, which errs to the fast side, most at small batches. So it is an estimate, and no bound.
Rates are those of `serving_rates.json`, which `python -m benchmarks.rates` writes.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from dsa_jax import Config
from dsa_jax.cache_shapes import cached_layers
from dsa_jax.hf import leaves
from dsa_jax.inference.speculative import MAX_DRAFTS, drafting_layers
from dsa_jax.parallel.expert_parallel import CAPACITY_FACTOR, GPUS_PER_HOST, pair_quota
from dsa_jax.parallel.sharding import RULES, check_model, parameter_axes, parse_mesh, path_names
from dsa_jax.stacks import PREDICTION_LAYERS
from train.planner.costs import Collective
from train.planner.hardware import at_number, network_seconds, usable_memory
from train.state import abstract_mesh, abstract_params

type Shape = Mapping[str, int]

WEIGHTS = ("fp8", "bfloat16")
DRAFTS = ("mtp", "ngram")  # what proposes tokens, as `dsa-jax serve --drafts` names it
LATENT_BLOCK = 128  # columns of a latent in FP8 that share a float32 scale
BFLOAT16, FLOAT32, INT32 = 2, 4, 4  # bytes

# The meshes of so many GPUs that differ in kind. With all on `expert`, no cache is kept twice; `tensor` answers a
# sequence faster, and keeps its cache as often as it is wide; a copy on each host keeps exchanges within the hosts.
MESHES = {
    8: ("expert=8", "expert=4,tensor=2", "tensor=8"),
    16: ("expert=16", "expert=8,tensor=2", "expert=2,tensor=8", "data=2,expert=8"),
}
BATCHES = (1, 16, 64, 128)  # sequences of a group: those at which decode kernels are timed
SEQUENCE = 131072  # tokens of the sequences in which the room of the cache is counted
PAGE = 64  # tokens of a page of the cache, which belongs to one sequence
PREFILL_CHUNK = 4096  # tokens of a prompt at a time: as many queries as the kernels' rates were recorded with
PREFILL_SCORE_BYTES = 512 << 20  # of index scores that the selection's kernel holds at a time, at most
FEED_FORWARD_ARRAYS = 3  # of the feed-forward's width that are alive together: gate, up, and their product

# The shape at which decode kernels are timed: the published one. Larger ones are taken to need more time in proportion
# to what they compute or read, whichever grows more; smaller ones no less, for latency is much of short calls.
TIMED_TOPK, TIMED_WIDTH, TIMED_LATENT_BYTES = 2048, 512 + 576, 656
TIMED_INDEX_WIDTH, TIMED_INDEX_BYTES = 64 * 128, 132


@dataclasses.dataclass(frozen=True)
class Job:
    """Describes what is served: a model, its routed experts and cache in "fp8" or "bfloat16", on a mesh.

    With `drafts`, "mtp" by the model's prediction layers or "ngram" by the text, a step verifies `MAX_DRAFTS` of them.

    Raises:
      ValueError: if the model's sizes cannot be split over the mesh, FP8 in whole blocks, or there are no such weights
        or drafts.
    """

    config: Config
    weights: str
    shape: Shape
    drafts: str | None = None

    def __post_init__(self):
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {self.weights!r}")
        if self.drafts not in (None, *DRAFTS):
            raise ValueError(f"drafts must be {' or '.join(DRAFTS)}, got {self.drafts!r}")
        if self.drafts == "mtp" and not self.config.num_nextn_predict_layers:
            raise ValueError("drafts mtp need a model with prediction layers, got num_nextn_predict_layers = 0")
        copy = dict(self.shape) | dict.fromkeys(RULES["fsdp"], 1)  # each copy has whole parameters
        check_model(abstract_mesh(copy), self.held)

    @property
    def held(self) -> Config:
        """The configuration of the model as it is loaded to be served: its parameters are what a GPU holds."""
        expert_dtype = "fp8" if self.weights == "fp8" else None
        layers = self.prediction_layers
        return dataclasses.replace(
            self.config, param_dtype="bfloat16", expert_dtype=expert_dtype, num_nextn_predict_layers=layers
        )

    @property
    def prediction_layers(self) -> int:
        """Counts the prediction layers, which are loaded where they draft."""
        return self.config.num_nextn_predict_layers if self.drafts == "mtp" else 0

    @property
    def verified(self) -> int:
        """Counts the tokens of a sequence that a step takes in: its last, and the drafts behind it."""
        return 1 if self.drafts is None else 1 + MAX_DRAFTS

    @property
    def gpus(self) -> int:
        """Counts the GPUs."""
        return math.prod(self.shape.values())

    @property
    def groups(self) -> int:
        """Counts the groups, each with its own sequences."""
        return self.gpus // shards(self.shape, "heads")


def jobs(config: Config, weights: str, gpus: int, drafts: str | None = None) -> list[Job]:
    """Lists the jobs on the meshes of so many GPUs that the model's sizes allow.

    Raises:
      ValueError: if there are no such meshes, weights or drafts, or the model allows none of them.
    """
    if gpus not in MESHES:
        raise ValueError(f"gpus must be {' or '.join(map(str, MESHES))}, got {gpus}")
    found, reasons = [], []
    for mesh in MESHES[gpus]:
        try:
            found.append(Job(config, weights, parse_mesh(mesh), drafts))
        except ValueError as error:
            reasons.append(str(error))
    if not found:
        raise ValueError(f"none of the meshes {'; '.join(MESHES[gpus])} will do: {reasons[0]}")
    return found


def shards(shape: Shape, name: str | None) -> int:
    """Counts the shards of a logical axis; parameters are whole along `fsdp`, which training alone splits."""
    return 1 if name in (None, "fsdp") else math.prod(shape[axis] for axis in RULES[name])


# Weights


@dataclasses.dataclass(frozen=True)
class Weight:
    """Counts what a GPU holds of one parameter, in all layers; a product multiplies every token by it."""

    part: str
    name: str
    elements: int
    bytes: int
    is_product: bool
    is_routed: bool  # to some of the tokens: an expert's


ATTENTION, EXPERTS, FEED_FORWARD, VOCABULARY = "attention", "routed experts", "other feed-forward", "vocabulary"
PREDICTION = "prediction layers"
PARTS = (ATTENTION, FEED_FORWARD, EXPERTS, VOCABULARY, PREDICTION)  # the last with its experts


@functools.lru_cache(maxsize=32)
def _weights(held: Config, shape: tuple[tuple[str, int], ...]) -> tuple[Weight, ...]:
    entries = {leaf.path: leaf.entry for leaf in leaves(held)}
    _, params = abstract_params(held)
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = path_names(path)[1:]  # without the group that trains it
        entry, axes = entries[names], parameter_axes(names, leaf.ndim)
        counts = [shards(dict(shape), axis) for axis in axes]
        elements = math.prod(size // count for size, count in zip(leaf.shape, counts, strict=True))
        nbytes = elements * (FLOAT32 if entry.keeps_float32 else leaf.dtype.itemsize)
        is_product = entry.inputs is not None and not entry.scale
        found.append(Weight(_part(names), names[-1], elements, nbytes, is_product, "experts" in names))
    return tuple(found)


def _part(names: Sequence[str]) -> str:
    if names[0] == PREDICTION_LAYERS:
        return PREDICTION
    if "experts" in names:
        return EXPERTS
    if "mlp" in names:
        return FEED_FORWARD
    return ATTENTION if names[0].endswith("_layers") else VOCABULARY


def weights_of(job: Job) -> tuple[Weight, ...]:
    """Counts what a GPU holds of each parameter.

    They are the parameters that `load_hf(expert_dtype=…)` leaves on a mesh. In "fp8" the routed experts are as FP8
    checkpoints store them, e4m3 with a float32 scale for each block of 128 × 128. Router, index weights and the index
    key's norm are float32, all others bfloat16.
    """
    return _weights(job.held, tuple(job.shape.items()))


def weight_bytes(job: Job) -> dict[str, int]:
    """Counts bytes of weights a GPU, by part; prediction layers are one where they draft."""
    parts = PARTS if job.prediction_layers else PARTS[:-1]
    return {part: sum(weight.bytes for weight in weights_of(job) if weight.part == part) for part in parts}


# Cache and workspace


def latent_bytes(config: Config, weights: str) -> int:
    """Counts bytes of a token's latent in a layer; rotary columns are bfloat16 in FP8 too."""
    if weights == "bfloat16":
        return BFLOAT16 * config.latent_dim
    scales = math.ceil(config.kv_lora_rank / LATENT_BLOCK)
    return config.kv_lora_rank + FLOAT32 * scales + BFLOAT16 * config.qk_rope_head_dim


def index_bytes(config: Config, weights: str) -> int:
    """Counts bytes of a token's index key in a layer; in FP8 with one float32 scale."""
    return BFLOAT16 * config.index_head_dim if weights == "bfloat16" else config.index_head_dim + FLOAT32


def token_bytes(job: Job) -> int:
    """Counts bytes of a token in the caches of all layers, of prediction layers too where they draft."""
    layers, indexers = cached_layers(job.held, predicting=True)
    return layers * latent_bytes(job.config, job.weights) + indexers * index_bytes(job.config, job.weights)


def workspace_bytes(job: Job, position: int) -> dict[str, int]:
    """Counts bytes of a GPU beside weights and cache, for sequences of up to `position` tokens.

    Those of a chunk of a prompt are the larger of attention's and the feed-forward's arrays, in bfloat16; the rows of
    experts are as many as an exchange has room for. A decode step has a row of float32 scores for each token.
    """
    config, tensor = job.config, shards(job.shape, "heads")
    hidden = 2 * config.hidden_size  # the residual stream, and its normalised copy
    queries = config.qk_nope_head_dim + config.qk_rope_head_dim + config.latent_dim + config.kv_lora_rank
    heads = config.num_attention_heads // tensor * queries  # queries, absorbed queries, and what they find
    slots = CAPACITY_FACTOR * config.num_experts_per_tok
    width = FEED_FORWARD_ARRAYS / shards(job.shape, "width")
    routed = slots * (2 * config.hidden_size + width * config.moe_intermediate_size) if config.num_moe_layers else 0
    dense = width * config.intermediate_size if config.num_dense_layers else 0
    attention = BFLOAT16 * (hidden + heads) + INT32 * config.index_topk
    chunk = PREFILL_CHUNK * max(attention, math.ceil(BFLOAT16 * (hidden + max(routed, dense))))
    return {
        "a chunk of a prompt": chunk,
        "its index scores": min(PREFILL_SCORE_BYTES, FLOAT32 * PREFILL_CHUNK * position),
        "index scores of decoding": FLOAT32 * max(BATCHES) * job.verified * position,
    }


def tokens_that_fit(job: Job, position: int) -> int:
    """Counts the tokens of cache, in whole pages, for which a GPU has room, and with it its group; 0 without room."""
    room = usable_memory() - sum(weight_bytes(job).values()) - sum(workspace_bytes(job, position).values())
    return max(0, room // (PAGE * token_bytes(job)) * PAGE)


def sequences_that_fit(job: Job, length: int, position: int) -> int:
    """Counts the sequences of `length` tokens that a group has room for; the last page of each may be part empty."""
    return tokens_that_fit(job, position) // (math.ceil(length / PAGE) * PAGE)


# Rates


@functools.cache
def recorded_rates() -> Mapping[str, Any]:
    """Reads `serving_rates.json`."""
    return json.loads((importlib.resources.files("train.planner") / "serving_rates.json").read_text())


def rate(name: str) -> float:
    """Gives a recorded rate a second."""
    return recorded_rates()["rates"][name]["value"]


def line_through(points: Mapping[int, float], size: float) -> float:
    """Interpolates times of calls by their size, and continues the first and the last line beyond them.

    What is smaller than all of them takes no less than in proportion, whatever the first line says. Of one point alone,
    what is larger grows in proportion, and what is smaller takes as long.

    Examples:
      >>> points = {1: 10.0, 3: 20.0}
      >>> line_through(points, 2), line_through(points, 5), line_through({2: 10.0}, 4)
      (15.0, 30.0, 20.0)
    """
    sizes = sorted(points)
    if len(sizes) == 1:
        return points[sizes[0]] * max(1.0, size / sizes[0])
    high = next((i for i in range(1, len(sizes)) if size <= sizes[i]), len(sizes) - 1)
    left, right = sizes[high - 1], sizes[high]
    line = points[left] + (points[right] - points[left]) * (size - left) / (right - left)
    return max(line, points[left] * size / left) if size < left else line


# A decode step: a token for each sequence of a batch, or with drafts some; `batch` sequences a group


def selection_seconds(job: Job, batch: int, position: int) -> float:
    """Computes the seconds in which a layer scores the keys of a group's sequences and selects of them.

    The time is taken to depend on the keys of all sequences together: a batch of 64 at 32K as one of 16 at 128K.
    """
    points = {row["batch"] * row["keys"]: row["microseconds"] / 1e6 for row in recorded_rates()["selection"]}
    products = job.config.index_n_heads * job.config.index_head_dim / TIMED_INDEX_WIDTH
    read = index_bytes(job.config, job.weights) / TIMED_INDEX_BYTES
    return line_through(points, batch * position) * max(1.0, products, read)


def attention_seconds(job: Job, batch: int) -> float:
    """Computes the seconds in which a layer attends, for a group's sequences with one GPU's heads."""
    rows, heads = recorded_rates()["attention"], job.config.num_attention_heads // shards(job.shape, "heads")
    points = {}
    for timed in {row["batch"] for row in rows}:
        times = {row["heads"]: row["microseconds"] / 1e6 for row in rows if row["batch"] == timed}
        points[timed] = at_number(times, heads) * max(1.0, heads / max(times))
    config, keys = job.config, job.config.index_topk / TIMED_TOPK
    products = keys * (config.latent_dim + config.kv_lora_rank) / TIMED_WIDTH
    read = keys * latent_bytes(config, job.weights) / TIMED_LATENT_BYTES
    return line_through(points, batch) * max(1.0, products, read)


def verification_ratio(batch: int) -> float:
    """Tells how many times as long a layer selects and attends for a token and its drafts as for a token alone."""
    rows = {row["batch"]: row["ratio"] for row in recorded_rates()["verification"]}
    return at_number(rows, batch)


def matrix_seconds(job: Job, tokens: int) -> float:
    """Computes the seconds of all products but the routed experts', in all layers and the head, for tokens of a group.

    Every matrix is read once, and none of the embedding but the rows of the tokens, unless it is the head too.
    """
    read = [w for w in weights_of(job) if w.part in (ATTENTION, FEED_FORWARD)]
    return _matrices((*read, *_head(job)), tokens)


def _head(job: Job) -> list[Weight]:
    """Lists the last norm and the head, which is the embedding where they are tied."""
    vocabulary = [weight for weight in weights_of(job) if weight.part == VOCABULARY]
    if job.config.tie_word_embeddings:
        return [dataclasses.replace(weight, is_product=weight.name == "embed_tokens") for weight in vocabulary]
    return [weight for weight in vocabulary if weight.name != "embed_tokens"]


def _matrices(weights: Sequence[Weight], tokens: int, share: float = 1.0) -> float:
    """Computes the seconds of products of tokens by a share of these weights."""
    products = sum(weight.elements for weight in weights if weight.is_product)
    return product_seconds(share * sum(weight.bytes for weight in weights), 2 * tokens * share * products)


def expert_seconds(job: Job, tokens: int, part: str = EXPERTS) -> float:
    """Computes the seconds of the routed experts of a part's layers, of which those are read that some token chose.

    Tokens choose evenly and for themselves: an expert is left by M tokens with probability (1 - k / X)^M.
    """
    config, experts = job.config, [each for each in weights_of(job) if each.is_routed and each.part == part]
    tokens *= shards(job.shape, "experts")  # of the groups that share the experts
    share = config.num_experts_per_tok / config.n_routed_experts
    read = (1 - (1 - share) ** tokens) * sum(weight.bytes for weight in experts)
    return product_seconds(read, 2 * tokens * share * sum(weight.elements for weight in experts if weight.is_product))


def drafting_seconds(job: Job, batch: int, position: int) -> float:
    """Computes the seconds in which the prediction layers draft: each takes in all tokens of a step, the last in turn
    the drafts behind those, and each draft reads the head.
    """
    if not job.prediction_layers:
        return 0.0
    layer = [each for each in weights_of(job) if each.part == PREDICTION and not each.is_routed]
    attention = selection_seconds(job, batch, position) + attention_seconds(job, batch)
    ratio = verification_ratio(batch)
    seconds = 0.0
    for draft in range(1, MAX_DRAFTS + 1):
        takes_all = draft <= drafting_layers(job.config)
        tokens = batch * (job.verified if takes_all else 1)
        seconds += attention * (ratio if takes_all else 1.0) + _matrices(_head(job), batch)
        seconds += _matrices(layer, tokens, 1 / job.prediction_layers)
        if job.config.num_moe_layers:
            seconds += expert_seconds(job, tokens, PREDICTION) / job.prediction_layers
        seconds += _network_seconds(job, tokens, dense=not job.config.num_moe_layers, moe=job.config.num_moe_layers > 0)
    return seconds


def product_seconds(nbytes: float, flops: float) -> float:
    """Computes the seconds of products by weights: the longer of reading these and of computing.

    FP8 weights are taken to be read as they are and multiplied in bfloat16, into which a kernel takes them in
    registers. XLA by itself writes a copy of a chunk's experts in bfloat16 and reads that: 5 bytes a weight, not 1.
    """
    return max(nbytes / rate("memory_bytes"), flops / rate("product_flops"))


def exchange_seconds(job: Job, tokens: int) -> float:
    """Computes the seconds of the exchanges of all layers, where experts are chosen evenly, one round an exchange."""
    return _network_seconds(job, tokens, dense=job.config.num_dense_layers, moe=job.config.num_moe_layers)


def _network_seconds(job, tokens, *, dense: int, moe: int) -> float:
    nvlink = {kind: figure["value"] for kind, figure in recorded_rates()["exchanges"].items()}
    exchanges = _exchanges(job.config, job.shape, tokens, dense, moe)
    return sum(count * network_seconds(job.shape, each, nvlink) for each, count in exchanges)


def _exchanges(config: Config, shape: Shape, tokens: int, dense: int, moe: int) -> Iterator[tuple[Collective, int]]:
    """Yields the exchanges of the embedding and so many layers, and how many there are of each.

    Over `tensor`, the embedding, each attention and each feed-forward sum their results, experts and shared experts
    each their own. Over `expert`, tokens travel to their experts and back: in one host as many as there are, between
    hosts the whole quota of each pair.
    """
    row, tensor, experts = BFLOAT16 * config.hidden_size, shards(shape, "heads"), shards(shape, "experts")
    if tensor > 1:
        sums = 1 + 2 * dense + (3 if config.n_shared_experts else 2) * moe
        yield Collective("all-reduce", RULES["heads"], 2 * tokens * row * (tensor - 1) / tensor), sums
    if experts > 1 and moe:
        is_ragged, slots = math.prod(shape.values()) <= GPUS_PER_HOST, config.num_experts_per_tok
        quota = pair_quota(tokens, slots, config.n_routed_experts // experts, experts)
        pair = tokens * slots / experts if is_ragged else quota
        kind = "ragged all-to-all" if is_ragged else "all-to-all"
        yield Collective(kind, RULES["experts"], pair * (experts - 1) * row), 2 * moe


@dataclasses.dataclass(frozen=True)
class Step:
    """Holds the seconds of a decode step by part, for `batch` sequences a group, all at the same position."""

    job: Job
    batch: int
    position: int
    seconds_by_part: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The seconds of the step, of which each sequence gets a token, and one more for each draft that is right."""
        return sum(self.seconds_by_part.values())

    @property
    def sequences(self) -> int:
        """The sequences of all groups."""
        return self.batch * self.job.groups

    @property
    def tokens_per_second(self) -> float:
        """The tokens a second of all GPUs, of which no draft is right."""
        return self.sequences / self.seconds

    @property
    def tokens_to_gain(self) -> float:
        """The tokens of a step and sequence above which drafts make it faster than it is without any."""
        return self.seconds / decode_step(dataclasses.replace(self.job, drafts=None), self.batch, self.position).seconds


def decode_step(job: Job, batch: int, position: int) -> Step:
    """Plans a decode step of `batch` sequences a group at `position`; not whether they fit."""
    layers, tokens = job.config.num_hidden_layers, batch * job.verified
    ratio = 1.0 if job.drafts is None else verification_ratio(batch)
    parts = {
        "selection": layers * ratio * selection_seconds(job, batch, position),
        "attention": layers * ratio * attention_seconds(job, batch),
        "matrices": matrix_seconds(job, tokens),
        "experts": expert_seconds(job, tokens) if job.config.num_moe_layers else 0.0,
        "exchanges": exchange_seconds(job, tokens),
    }
    if job.prediction_layers:
        parts["drafting"] = drafting_seconds(job, batch, position)
    return Step(job, batch, position, parts)
