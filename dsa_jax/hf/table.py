"""Says which tensor of a Hugging Face checkpoint is which parameter: one table, in which every name is matched once."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from dsa_jax.config import Config
from dsa_jax.quantization import WEIGHT_BLOCK
from dsa_jax.stacks import KINDS, PREDICTION_LAYERS, StackedLayers, all_stacks, base_name, is_stack

# Parts of paths and names alike. The first parameters are float32 if the file has them so, the second always; none of
# them is ever rounded.
FLOAT32_IF_STORED = (".indexer.weights_proj", ".indexer.k_norm", ".mlp.gate.weight")
ALWAYS_FLOAT32 = ".e_score_correction_bias"
EXPERTS = ".mlp.experts."  # in the names of the routed experts' tensors
SCALE_SUFFIX = "_scale_inv"  # of the name of an FP8 weight's scales


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: a parameter, its tensors and their dimensions."""

    path: str  # in the model's state; "layers." at its beginning stands for every kind of stack
    name: str  # of the tensors in the files, with places for layer and expert
    # The parameter's dimensions, without layers and experts. "Q -> N P+R" is a matrix of Q inputs, which the file holds
    # transposed and flattened, [N · (P+R), Q]; without an arrow the file holds what the parameter does. D/128 counts
    # the FP8 blocks of D.
    dims: str

    @property
    def stacks(self) -> tuple[str, ...]:
        """Lists the leading names of its paths: stacks of layers, or "" for a parameter that is not stacked."""
        stack = self.path.split(".")[0]
        if stack == "layers":
            return tuple(KINDS)
        if ".mlp." in self.path:  # prediction layers have the feed-forward of one of the others
            return stack, PREDICTION_LAYERS
        return (stack,) if is_stack(stack) else ("",)

    @property
    def experts(self) -> bool:
        """Tells whether each expert has a tensor of its own."""
        return "{expert}" in self.name

    @property
    def inputs(self) -> int | None:
        """Counts the dimensions that are inputs of a matrix; None if the file holds the parameter as it is."""
        return len(self.dims.split(" -> ")[0].split()) if "->" in self.dims else None

    @property
    def indexer(self) -> bool:
        """Tells whether the parameter is the indexer's."""
        return ".indexer." in self.path

    @property
    def scale(self) -> bool:
        """Tells whether it is the scales of a weight in FP8."""
        return self.path.endswith("_scale")

    @property
    def keeps_float32(self) -> bool:
        """Tells whether it stays float32 if the file has it so: the router, the index weights, the index key's norm."""
        return any(part in self.path for part in FLOAT32_IF_STORED)

    @property
    def always_float32(self) -> bool:
        """Tells whether it is float32 whatever `param_dtype` says: the router's selection bias, and scales of FP8."""
        return ALWAYS_FLOAT32 in self.path or self.scale

    def shape(self, config: Config) -> tuple[int, ...]:
        """Computes the shape that the parameter gives one tensor."""
        return tuple(_size(dim, config) for dim in self.dims.replace("->", "").split())

    def file_shape(self, config: Config) -> tuple[int, ...]:
        """Computes the shape that the file gives one tensor."""
        shape = self.shape(config)
        if self.inputs is None:
            return shape
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def in_file(self, dims: tuple[Any, ...]) -> tuple[Any, ...]:
        """Orders what belongs to each of the parameter's dimensions as the file has them: inputs last."""
        return dims[self.inputs or 0 :] + dims[: self.inputs or 0]

    def to_file(self, x: Any) -> Any:
        """Takes one tensor from the parameter's layout to the file's."""
        return x if self.inputs is None else x.reshape(math.prod(x.shape[: self.inputs]), -1).T


TABLE = (
    Entry("embed_tokens", "model.embed_tokens.weight", "vocab D"),
    Entry("norm.weight", "model.norm.weight", "D"),
    Entry("lm_head", "lm_head.weight", "D -> vocab"),
    *(
        Entry("layers." + path, "model.layers.{layer}." + (name or path + ".weight"), dims)
        for path, name, dims in (
            ("input_layernorm.weight", "input_layernorm.weight", "D"),
            ("post_attention_layernorm.weight", "post_attention_layernorm.weight", "D"),
            ("self_attn.q_a_proj", "", "D -> Q"),
            ("self_attn.q_a_layernorm.weight", "self_attn.q_a_layernorm.weight", "Q"),
            ("self_attn.q_b_proj", "", "Q -> N P+R"),
            ("self_attn.kv_a_proj_with_mqa", "", "D -> C+R"),
            ("self_attn.kv_a_layernorm.weight", "self_attn.kv_a_layernorm.weight", "C"),
            ("self_attn.kv_b_proj", "", "C -> N P+V"),
            ("self_attn.o_proj", "", "N V -> D"),
            ("self_attn.indexer.wq_b", "", "Q -> J E"),
            ("self_attn.indexer.wk", "", "D -> E"),
            ("self_attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.weight", "E"),
            ("self_attn.indexer.k_norm.bias", "self_attn.indexer.k_norm.bias", "E"),
            ("self_attn.indexer.weights_proj", "", "D -> J"),
        )
    ),
    *(
        Entry(f"{PREDICTION_LAYERS}.{path}", f"model.layers.{{layer}}.{name}.weight", dims)
        for path, name, dims in (
            ("enorm.weight", "enorm", "D"),
            ("hnorm.weight", "hnorm", "D"),
            ("eh_proj", "eh_proj", "2D -> D"),
            ("norm.weight", "shared_head.norm", "D"),
        )
    ),
    Entry("dense_layers.mlp.gate_proj", "model.layers.{layer}.mlp.gate_proj.weight", "D -> F"),
    Entry("dense_layers.mlp.up_proj", "model.layers.{layer}.mlp.up_proj.weight", "D -> F"),
    Entry("dense_layers.mlp.down_proj", "model.layers.{layer}.mlp.down_proj.weight", "F -> D"),
    Entry("moe_layers.mlp.gate.weight", "model.layers.{layer}.mlp.gate.weight", "D -> X"),
    Entry("moe_layers.mlp.gate.e_score_correction_bias", "model.layers.{layer}.mlp.gate.e_score_correction_bias", "X"),
    *(
        Entry(f"moe_layers.mlp.{part}.{proj}", f"model.layers.{{layer}}.mlp.{part}{expert}.{proj}.weight", dims)
        for part, expert, width in (("experts", ".{expert}", "Fx"), ("shared_experts", "", "Fs"))
        for proj, dims in (
            ("gate_proj", f"D -> {width}"),
            ("up_proj", f"D -> {width}"),
            ("down_proj", f"{width} -> D"),
        )
    ),
    *(
        Entry(
            f"moe_layers.mlp.experts.{proj}_scale",
            f"model.layers.{{layer}}.mlp.experts.{{expert}}.{proj}.weight{SCALE_SUFFIX}",
            dims,
        )
        for proj, dims in (
            ("gate_proj", "D/128 -> Fx/128"),
            ("up_proj", "D/128 -> Fx/128"),
            ("down_proj", "Fx/128 -> D/128"),
        )
    ),
)


def _size(dim: str, config: Config) -> int:
    """Computes a dimension in the letters of `config.py`; Fx and Fs are the widths of routed and shared experts."""
    sizes = {
        "vocab": config.vocab_size,
        "D": config.hidden_size,
        "2D": 2 * config.hidden_size,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "N": config.num_attention_heads,
        "P": config.qk_nope_head_dim,
        "R": config.qk_rope_head_dim,
        "V": config.v_head_dim,
        "J": config.index_n_heads,
        "E": config.index_head_dim,
        "X": config.n_routed_experts,
        "F": config.intermediate_size,
        "Fx": config.moe_intermediate_size,
        "Fs": config.moe_intermediate_size * config.n_shared_experts,
    }
    if dim.endswith("/128"):
        return -(-sizes[dim.removesuffix("/128")] // WEIGHT_BLOCK)
    return sum(sizes[letter] for letter in dim.split("+"))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a model: a row of the table in one stack of layers."""

    entry: Entry
    path: tuple[str, ...]
    layers: tuple[int, ...] | None  # the numbers of the layers that are stacked, None if it is no layer's
    experts: int | None  # how many experts are stacked, None if it is no expert's

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yields where each of its tensors stands in the parameter, and the tensor's name in the files."""
        sizes = None if self.layers is None else len(self.layers), self.experts
        for index in itertools.product(*(range(size) for size in sizes if size is not None)):
            layer = None if self.layers is None else self.layers[index[0]]
            yield index, self.entry.name.format(layer=layer, expert=index[-1] if index else None)

    def shape(self, config: Config) -> tuple[int, ...]:
        """Computes the parameter's shape."""
        sizes = None if self.layers is None else len(self.layers), self.experts
        return *(size for size in sizes if size is not None), *self.entry.shape(config)


def leaves(config: Config) -> list[Leaf]:
    """Lists every parameter of a model of this configuration.

    Examples:
      >>> leaf = leaves(Config.tiny())[0]
      >>> leaf.path, list(leaf.tensors()), leaf.shape(Config.tiny())
      (('embed_tokens',), [((), 'model.embed_tokens.weight')], (256, 128))
    """
    stacks: dict[str, list[StackedLayers]] = {name: [] for name in KINDS}
    for stack in all_stacks(config):
        stacks[base_name(stack.name)].append(stack)
    result = []
    for entry in TABLE:
        absent = entry.path == "lm_head" and config.tie_word_embeddings
        absent |= ".shared_experts." in entry.path and config.n_shared_experts == 0
        absent |= entry.scale and config.expert_dtype is None
        if absent:
            continue
        experts = config.n_routed_experts if entry.experts else None
        for base in entry.stacks:
            if not base:
                result.append(Leaf(entry, _path(entry, base), None, experts))
            for stack in stacks.get(base, ()):
                if not _has_feed_forward(entry, stack):
                    continue
                if layers := layers_of(entry, stack):
                    result.append(Leaf(entry, _path(entry, stack.name), layers, experts))
    return result


def _has_feed_forward(entry: Entry, stack: StackedLayers) -> bool:
    """Tells whether a stack has the feed-forward that a row is of; True for all other rows."""
    return ".mlp." not in entry.path or entry.path.startswith("moe_layers.") == stack.moe


def layers_of(entry: Entry, stack: StackedLayers) -> tuple[int, ...]:
    """Lists the numbers of a stack's layers that have a parameter: of the indexer those with one."""
    return stack.indexers if entry.indexer else stack.layers


def row_of(path: tuple[str, ...]) -> Entry | None:
    """Finds the row of a parameter by its path, whatever the number of its stack; None if it is none of a model."""
    return ROWS.get((base_name(path[0]), *path[1:])) if path else None


def _path(entry: Entry, stack: str) -> tuple[str, ...]:
    """Gives the path of a row in one stack of layers."""
    names = entry.path.split(".")
    return (stack, *names[1:]) if stack else tuple(names)


# The table's rows by the parameters' paths in the first stack of a kind.
ROWS = {_path(entry, stack): entry for entry in TABLE for stack in entry.stacks}
