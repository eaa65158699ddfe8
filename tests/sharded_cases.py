"""Helpers for tests of the model on a mesh beside one device: inputs of any seed, programs, how choices may differ."""

import dataclasses
import functools
import itertools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import FAST, same_bits
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from train_cases import small_batch, small_config

from dsa_jax import Config, index_scores
from dsa_jax.parallel.collectives import sum_statistics
from dsa_jax.parallel.sharding import (
    AXES,
    describe,
    make_mesh,
    parameter_axes,
    parameter_shardings,
    parse_mesh,
    path_names,
    place_batch,
    shards,
    spec,
    zigzag_order,
)
from dsa_jax.rope import rotation as rope_rotation
from train.data import Batch
from train.phases import Params, Phase, merge_groups
from train.state import abstract_params

SEED_VARIABLE = "MESHES_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(3)))  # another in every run
HALF_ULP = 1.01 * 2.0**-24  # and a little, so that it does not round to nothing
REPEAT = f"(repeat with {SEED_VARIABLE}={SEED})"

DEVICES, LAYERS, ROWS, LENGTH = 8, 3, 8, 80  # a batch is [ROWS, LENGTH]
STEPS = 10  # of plain gradient descent
RATE = 0.1  # its learning rate
NEAR = 1e-6  # the distance from the last chosen score within which rounding may choose otherwise
NEAR_KINK = 1e-5  # the distance from 0 within which relu's gradient may jump: logits are sums of terms up to 10

SIZES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if math.prod(sizes) == DEVICES]
EVERY_MESH = [describe(dict(zip(AXES, sizes, strict=True))) for sizes in SIZES]


def mesh_config(**changes) -> Config:
    """Gives sizes that every mesh of eight devices divides; no other dimension has the number of layers or tokens."""
    sizes = dict(num_hidden_layers=LAYERS, first_k_dense_replace=0, num_attention_heads=8, n_routed_experts=8)
    sizes |= dict(max_position_embeddings=LENGTH)
    return small_config(**sizes | changes)


def random_params(config: Config, seed: int) -> Params:
    """Draws NumPy parameters with which activations are near 1, and so scores far apart."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [key.key for key in path]
        mean = names[-1] == "weight" and names[-2].endswith("norm")
        scale = 0.01 if names[-1] == "e_score_correction_bias" else 0.1 if "norm" in names[-2] else 0.25
        return (mean + scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config)[1])


def random_batch(seed: int) -> Batch:
    """Draws packed documents and padding; the last row, the only one of one of eight shards, is padding alone."""
    batch = small_batch(ROWS, LENGTH, seed=seed)
    return jax.tree.map(lambda x: np.concatenate([x[:-1], np.zeros_like(x[-1:])]), batch)


def mesh_of(name: str) -> Mesh:
    """Makes the mesh of a description, on as many devices as it needs."""
    sizes = parse_mesh(name)
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def place_params(params: Any, mesh: Mesh | None) -> Any:
    """Puts parameters where a mesh has them; without one they stay NumPy's."""
    return params if mesh is None else jax.device_put(params, parameter_shardings(params, mesh))


def place_tokens(batch: Batch, mesh: Mesh | None) -> Batch:
    """Puts a batch in zigzag order on its shards; without a mesh it stays as it is."""
    return batch if mesh is None else place_batch(batch, mesh)


def place_choices(choices: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Puts selections and routings [layers, B, T, …], in natural order, where the shards' tokens are."""
    if mesh is None:
        return choices
    sharding = NamedSharding(mesh, spec(None, "batch", "sequence"))
    order = zigzag_order(LENGTH, shards(mesh, "sequence"))
    return {name: jax.device_put(x[:, :, order], sharding) for name, x in choices.items()}


def natural(choices: dict[str, jax.Array], mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Takes selections and routings back to natural order, after comparing every copy of them."""
    order = np.arange(LENGTH) if mesh is None else zigzag_order(LENGTH, shards(mesh, "sequence"))
    return {name: whole(x)[:, :, np.argsort(order)] for name, x in choices.items()}


def whole(x: jax.Array) -> np.ndarray:
    """Gives an array as NumPy's; asserts that devices which hold the same part of it hold the same bits."""
    copies = {}
    for shard in x.addressable_shards:
        same_bits(shard.data, copies.setdefault(str(shard.index), shard.data))
    return np.asarray(x)


def compile_on(mesh: Mesh | None, function, *arguments, out=None):
    """Compiles a function of each shard's part of the arguments, which are on the mesh; without one, of all of them."""
    if mesh is not None:
        specs = jax.tree.map(lambda x: x.sharding.spec, arguments)
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(function).lower(*arguments).compile(compiler_options=FAST)


def _losses(model, output, batch, phase) -> dict[str, jax.Array]:
    """Computes this shard's part of the phase's losses."""
    return {
        name: loss.total(model, output, batch) / sum_statistics(loss.count(batch), "tokens")
        for name, loss in phase.losses
    }


@dataclasses.dataclass(frozen=True)
class Forward:
    """Computes the losses, expert load and all choices of one pass."""

    graphdef: nnx.GraphDef
    phase: Phase

    def __call__(self, params: Params, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Computes the losses and load of all shards, and the selections and routings of this shard's tokens."""
        model = merge_groups(self.graphdef, params)
        arguments = dict(keys=batch.keys, positions=batch.positions, attention=self.phase.attention)
        sparse = self.phase.attention == "sparse"
        output = model(batch.tokens, **arguments, return_selected=sparse, return_routed=True)
        choices = {"routed": output.routed, "selected": output.selected}
        choices = {kind: chosen for kind, chosen in choices.items() if chosen is not None}
        losses = sum_statistics(_losses(model, output, batch, self.phase), "tokens")
        return losses | {"expert_load": output.expert_load}, choices

    def compile(self, mesh: Mesh | None, params: Params, batch: Batch):
        """Compiles the function for these arguments, which are on the mesh."""
        return compile_on(mesh, self, params, batch, out=(spec(), spec(None, "batch", "sequence")))


@dataclasses.dataclass(frozen=True)
class Descent:
    """Takes one step of plain gradient descent under imposed choices."""

    graphdef: nnx.GraphDef
    phase: Phase

    def __call__(self, params: Params, batch: Batch, choices: dict[str, jax.Array]) -> tuple[Params, Params, dict]:
        """Computes the gradients of the phase's groups, all parameters after the step, and the losses."""

        def loss(trained):
            model = merge_groups(self.graphdef, params | trained)
            arguments = dict(keys=batch.keys, positions=batch.positions, attention=self.phase.attention)
            losses = _losses(model, model(batch.tokens, **arguments, **choices), batch, self.phase)
            return sum(losses.values()), losses

        trained = {group: params[group] for group in self.phase.trains}
        gradients, losses = jax.grad(loss, has_aux=True)(trained)
        sgd = optax.sgd(RATE)
        moved = optax.apply_updates(trained, sgd.update(gradients, sgd.init(trained))[0])
        return gradients, params | moved, sum_statistics(losses, "tokens")

    def compile(self, mesh: Mesh | None, params: Params, batch: Batch, choices: dict[str, Any]):
        """Compiles the function for these arguments, which are on the mesh."""
        specs = None
        if mesh is not None:
            specs = jax.tree.map(lambda x: x.sharding.spec, params)
        out = None if specs is None else ({group: specs[group] for group in self.phase.trains}, specs, spec())
        return compile_on(mesh, self, params, batch, choices, out=out)


def layer_scores(graphdef: nnx.GraphDef, phase: Phase, params: Params, batch: Batch, choices: Any) -> Any:
    """Computes the scores of each layer on one device, under imposed choices.

    Returns:
      For each layer index scores [B, T, S], the router's biased scores [B, T, X], and the smallest |q_index · k_index|
      of all reachable pairs, at 0 of which the gradient of relu jumps.
    """
    model, keys = merge_groups(graphdef, params), batch.keys
    rotation = rope_rotation(batch.positions, model.config)
    x, results = model.embed_tokens[...][batch.tokens], []
    for layer, module in enumerate(model.layers()):
        imposed = {name: choice[layer] for name, choice in choices.items()}
        attention = dict(attention=phase.attention, selected=imposed.get("selected"))
        y = module.input_layernorm(x)
        p = module.self_attn.project(y, rotation)
        index = index_scores(p.q_index, p.k_index, p.weights, keys)
        logits = jnp.abs(jnp.einsum("btje,bse->btjs", p.q_index, p.k_index))
        kink = jnp.min(jnp.where(keys.mask(LENGTH)[:, :, None], logits, jnp.inf))
        y = module.post_attention_layernorm(x + module.self_attn(y, rotation, keys, **attention).x)
        gate = module.mlp.gate
        router = jax.nn.sigmoid(y @ gate.weight[...]) + gate.e_score_correction_bias[...]
        results.append((index, router, kink))
        x = module(x, rotation, keys, routed=imposed.get("routed"), **attention).x
    return results


def _members(chosen, size):
    """Tells whether each of `size` candidates [*B, size] is among the chosen [*B, k]; negative ones are none."""
    return (chosen[..., None] == np.arange(size)).any(-2)


def near_boundary(scores: np.ndarray, k: int, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Tells of each row [*B] whether two choices of the `k` highest scores [*B, S] differ near the last alone."""
    scores = np.asarray(scores, np.float64)
    last = np.sort(scores, axis=-1)[..., -min(k, scores.shape[-1]), None]
    with np.errstate(invalid="ignore"):
        near = np.abs(scores - last) <= NEAR
    size = scores.shape[-1]
    return (near | (_members(mine, size) == _members(theirs, size))).all(-1)


def near_routing(scores: np.ndarray, config: Config, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Does what `near_boundary` does for biased router scores [*B, X]; the last chosen group is a boundary too."""
    grouped = scores.reshape(*scores.shape[:-1], config.n_group, -1)
    of_groups = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
    ranked = np.sort(of_groups, axis=-1)[..., ::-1]
    last = ranked[..., config.topk_group - 1]
    split = (
        config.topk_group < config.n_group and last - ranked[..., min(config.topk_group, config.n_group - 1)] <= NEAR
    )
    eligible = np.where((of_groups >= last[..., None])[..., None], grouped, -np.inf).reshape(scores.shape)
    return split | near_boundary(eligible, config.num_experts_per_tok, mine, theirs)


def count_flips(config: Config, batch: Batch, mine: dict, theirs: dict, scores: Any) -> tuple[int, int]:
    """Counts the rows that two runs choose otherwise at a boundary, and later rows of their documents that follow.

    Raises:
      AssertionError: if a row differs that neither lies by a boundary nor has a differing token before it.
    """
    clean, near, followed = np.ones((ROWS, LENGTH), bool), 0, 0
    document = np.asarray(batch.start)
    stages = [(kind, layer) for layer in range(len(mine["routed"])) for kind in ("selected", "routed") if kind in mine]
    for kind, layer in stages:
        a, b = mine[kind][layer], theirs[kind][layer]
        differ = (np.sort(a) != np.sort(b)).any(-1)
        if not differ.any():
            continue
        index, router, _ = scores()[layer]
        if kind == "selected":
            tied = near_boundary(np.asarray(index), config.index_topk, a, b)
        else:
            tied = near_routing(np.asarray(router), config, a, b)
        unforgiven = differ & clean & ~tied
        where = f"{np.argwhere(unforgiven)[:4]} {REPEAT}"
        assert not unforgiven.any(), f"{kind} of layer {layer} differ off the boundary at {where}"
        near, followed = near + int((differ & clean).sum()), followed + int((differ & ~clean).sum())
        for row, query in np.argwhere(differ):
            clean[row] &= document[row] != document[row, query]
    return near, followed


class OneDevice:
    """Runs a configuration on one device: programs, compiled when first asked for, and ten steps of descent."""

    def __init__(self, config: Config):
        self.config, self.graphdef = config, abstract_params(config)[0]
        self.params = random_params(config, SEED)
        self.batches = [random_batch(SEED + step) for step in range(STEPS)]
        self._programs, self._descents = {}, {}

    def _run(self, kind, phase: Phase, *arguments):
        program = self._programs.get((kind, phase))
        if program is None:
            function = functools.partial(layer_scores, self.graphdef, phase) if kind is layer_scores else None
            function = function or kind(self.graphdef, phase)
            program = self._programs[kind, phase] = compile_on(None, function, *arguments)
        return jax.device_get(program(*arguments))

    def forward(self, phase: Phase, params: Params, batch: Batch) -> tuple[dict, dict]:
        """Runs `Forward`."""
        return self._run(Forward, phase, params, batch)

    def descend(self, phase: Phase, params: Params, batch: Batch, choices: dict) -> tuple[Params, Params, dict]:
        """Runs `Descent`."""
        return self._run(Descent, phase, params, batch, choices)

    def scores(self, phase: Phase, params: Params, batch: Batch, choices: dict) -> list[tuple]:
        """Runs `layer_scores`."""
        return self._run(layer_scores, phase, params, batch, choices)

    def descent(self, phase: Phase) -> list[tuple]:
        """Takes ten steps of plain gradient descent; gives of each the parameters before, batch, choices and result."""
        if phase not in self._descents:
            params, steps = self.params, []
            for batch in self.batches:
                has_choices = phase.attention == "sparse" or self.config.num_moe_layers
                choices = self.forward(phase, params, batch)[1] if has_choices else {}
                result = self.descend(phase, params, batch, choices)
                steps.append((params, batch, choices, result))
                params = result[1]
            self._descents[phase] = steps
        return self._descents[phase]

    def rounding(self, phase: Phase) -> list[float]:
        """Measures how far each gradient of the first step moves by rounding alone, relative to its norm.

        The parameters are moved by half a unit in their last place, one way or the other at random; of four draws the
        largest. Some models amplify that tenfold, of which the mesh is not the cause.
        """
        params, batch, choices, (gradients, *_) = self.descent(phase)[0]
        found = np.zeros(len(jax.tree.leaves(gradients)))
        for draw in range(4):
            rng = np.random.default_rng(draw)
            signs = jax.tree.map(lambda x, rng=rng: rng.choice([-1.0, 1.0], size=np.shape(x)), params)
            moved = jax.tree.map(
                lambda x, sign: np.float32(np.float64(x) * (1 + 1.01 * 2.0**-24 * sign)), params, signs
            )
            other = self.descend(phase, moved, batch, choices)[0]
            pairs = zip(jax.tree.leaves(other), jax.tree.leaves(gradients), strict=True)
            found = np.maximum(found, [relative_error(mine, theirs) for mine, theirs in pairs])
        return found.tolist()

    def near_kink(self, phase: Phase) -> bool:
        """Tells whether in any of these steps a logit of the indexer is so near 0 that its gradient may jump."""
        scores = (self.scores(phase, params, batch, choices) for params, batch, choices, _ in self.descent(phase))
        return any(kink <= NEAR_KINK for layers in scores for _, _, kink in layers)


def relative_error(actual: Any, expected: Any) -> float:
    """Computes |actual - expected| / |expected|, of norms; |actual| where nothing was expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / size if size else np.linalg.norm(actual))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a compiled program."""

    kind: str
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and dimensions of the results
    in_loop: bool  # whether a loop's body holds it


KINDS = (
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)


def collectives_of(text: str) -> list[Collective]:
    """Lists all exchanges in the text of a compiled program."""
    computations, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computations[name := head[1]] = []
        elif name:
            computations[name].append(line)

    def called(lines, attributes):
        values = re.findall(rf"\b(?:{attributes})=(\{{[^}}]*\}}|%?[\w.\-]+)", "\n".join(lines))
        return {callee for value in values for callee in re.findall(r"[\w.\-]+", value)} & computations.keys()

    everything = "body|condition|calls|to_apply|branch_computations|true_computation|false_computation"
    inside = set()
    queue = [body for lines in computations.values() for body in called(lines, "body")]
    while queue:
        if (name := queue.pop()) not in inside:
            inside.add(name)
            queue += called(computations[name], everything)

    found = []
    for name, lines in computations.items():
        for line in lines:
            if match := re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
                shapes = [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in _shapes(match[1])]
                found.append(Collective(match[2], shapes, name in inside))
    return found


def _shapes(text):
    return re.findall(r"(\w+)\[([\d,]+)\]", text)


def gathered_scores(exchanges: list[Collective], tokens: int) -> list[Collective]:
    """Picks exchanges whose results have a dimension of all keys and another of a shard's `tokens`, or more of them."""

    def of_scores(shape):
        pairs = itertools.permutations(shape, 2)
        return any(keys % LENGTH == 0 and queries % tokens == 0 for keys, queries in pairs)

    moving = [e for e in exchanges if e.kind not in ("all-reduce", "reduce-scatter")]  # the target is summed over heads
    return [e for e in moving if any(of_scores(shape) for _, shape in e.shapes)]


def gathered_layers(exchanges: list[Collective]) -> list[Collective]:
    """Picks all-gathers of stacked layers, wherever they stand."""
    return [e for e in exchanges if e.kind == "all-gather" and any(LAYERS in shape for _, shape in e.shapes)]


def parameter_gathers(config: Config, mesh: Mesh) -> set[tuple[int, ...]]:
    """Lists the shapes in which a layer's fully sharded parameters must come out of their gathers."""
    shapes = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(config)[1])[0]:
        axes = parameter_axes(path_names(path), leaf.ndim)
        if "fsdp" in axes and "layers" in str(path):
            sizes = [1 if axis in (None, "fsdp") else shards(mesh, axis) for axis in axes]
            shapes.add(tuple(dim // size for dim, size in zip(leaf.shape, sizes, strict=True))[1:])
    return shapes
