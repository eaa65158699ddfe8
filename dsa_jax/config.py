"""Holds the model's configuration and the letters that name every dimension; `config_hf` has the spelling of others.

Letter table, used in every signature, einsum and comment:

    B batch                  T queries                S keys                   K selected keys
    N attention heads        J index heads            E index head dim         D model dim
    Q query latent           C key/value latent       R rotary dim             P un-rotated head dim
    V value head dim         X experts                F feed-forward width
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from dsa_jax.config_hf import MAX_INT, MAX_LAYERS, read_fields, to_json
from dsa_jax.nsa_sizes import NSASizes
from dsa_jax.strict_json import shown
from dsa_jax.yarn import MAX_FLOAT, YaRN


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and choices of a DSA transformer.

    Fields are named as in Hugging Face's `config.json`; defaults are the published 671B model, but for the token ids,
    which a tokenizer decides. Normalisations, softmax, router, index weights and losses are float32 whatever `dtype`
    and `param_dtype` say; both may be given as NumPy's or JAX's dtypes and are kept as names.

    Raises:
      ValueError: if a value is of another type or out of range, or sizes do not fit each other, naming the field.

    Examples:
      >>> Config.tiny(index_topk=8).index_topk
      8
    """

    vocab_size: int = 129280
    hidden_size: int = 7168  # D
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3  # layers before the first MoE layer
    num_attention_heads: int = 128  # N
    q_lora_rank: int = 1536  # Q
    kv_lora_rank: int = 512  # C
    qk_nope_head_dim: int = 128  # P
    qk_rope_head_dim: int = 64  # R; 0 for latents without a rotary part
    v_head_dim: int = 128  # V
    index_n_heads: int = 64  # J
    index_head_dim: int = 128  # E
    index_topk: int = 2048  # K
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256  # X
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8  # groups of experts
    topk_group: int = 4  # groups that a token's experts may come from
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float | None = None  # of the norms of MLA's latents; None is `rms_norm_eps`
    rope_theta: float = 10000.0
    rope_scaling: YaRN | None = YaRN(40.0, 4096)
    max_position_embeddings: int = 163840  # tokens of a sequence, at most
    initializer_range: float = 0.02  # standard deviation of new parameters
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0  # past the last layer, each to predict a token more: see `dsa_jax.prediction`
    index_rope_interleave: bool = False  # True in GLM's, whose indexer pairs neighbouring columns
    # Of each layer "full", with an indexer, or "shared", which reuses the selection before it; () has all of them full.
    indexer_types: tuple[str, ...] = ()
    index_share_kl: Literal["mean", "own"] = "mean"  # an indexer learns from all layers that it serves, or its own
    index_fp8: bool = False  # Hadamard transform and e4m3 index queries and keys
    index_kl_target: Literal["sum", "max"] = "sum"  # over heads, of the attention that the indexer learns to imitate
    baseline: Literal["none", "blocks", "window", "nsa"] = "none"  # another attention, of `dsa_jax.baselines`
    block_size: int = 64  # keys of a block, under "blocks"
    nsa: NSASizes = NSASizes()  # of its branches, under "nsa"
    bos_token_id: int | None = None  # begins a text
    eos_token_id: tuple[int, ...] = ()  # any of them ends a text
    pad_token_id: int | None = None
    dtype: str = "bfloat16"  # of the computation
    param_dtype: str = "float32"  # of the parameters
    expert_dtype: Literal["fp8"] | None = None  # of the routed experts' weights, for inference; None is `param_dtype`

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        self._check_values()
        self._check_experts()

    def _check_values(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {shown(getattr(self, name))}")
        for name in ("num_hidden_layers", "num_nextn_predict_layers"):
            if getattr(self, name) > MAX_LAYERS:
                raise ValueError(f"{name} must be at most {MAX_LAYERS}, got {getattr(self, name)}")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        for name in ("rms_norm_eps", "latent_norm_eps"):
            eps = getattr(self, name)
            if eps is not None and eps <= 0:
                raise ValueError(f"{name} must be above 0, got {eps}")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim must be at least qk_rope_head_dim, got {self.index_head_dim} < {self.qk_rope_head_dim}"
            )
        if self.index_fp8 and self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_fp8 needs index_head_dim a power of two, got {self.index_head_dim}")
        if self.baseline == "blocks" and self.index_topk % self.block_size:
            raise ValueError(f"block_size must divide index_topk {self.index_topk}, got {self.block_size}")
        if self.baseline == "nsa" and self.num_nextn_predict_layers:
            raise ValueError(f"num_nextn_predict_layers must be 0 under 'nsa', got {self.num_nextn_predict_layers}")
        self._check_indexer_types()

    def _check_indexer_types(self):
        types = self.indexer_types
        if types and (len(types) != self.num_hidden_layers or types[0] != "full" or set(types) - {"full", "shared"}):
            raise ValueError(
                f"indexer_types must be 'full' or 'shared' for each of the {self.num_hidden_layers} layers, the first "
                f"of them 'full', got {shown(list(types))}"
            )
        if "shared" not in types:  # one spelling: configurations that mean the same are equal
            object.__setattr__(self, "indexer_types", ())
        elif self.baseline != "none":
            raise ValueError(f"indexer_types must have no 'shared' layer under baseline {self.baseline!r}")

    def _check_experts(self):
        if self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group:
            raise ValueError(
                "n_routed_experts must be a multiple of n_group with at least two experts a group, "
                f"got {self.n_routed_experts} experts in {self.n_group} groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group must be at most n_group, got {self.topk_group} > {self.n_group}")
        eligible = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            raise ValueError(
                f"num_experts_per_tok must be at most the {eligible} experts of topk_group groups, "
                f"got {self.num_experts_per_tok}"
            )

    @property
    def num_dense_layers(self) -> int:
        """Counts the layers with a dense feed-forward, which come first; the others route to experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        """Counts the layers whose feed-forward routes to experts."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def num_index_layers(self) -> int:
        """Counts the layers that have an indexer, and so keep index keys."""
        if self.baseline == "nsa":
            return 0
        return self.indexer_types.count("full") if self.indexer_types else self.num_hidden_layers

    @property
    def latent_dim(self) -> int:
        """Computes C + R, the width of one cached key/value entry."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Computes (P + R)^-0.5, times the square of YaRN's magnitude."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        yarn = self.rope_scaling
        return scale if yarn is None else scale * yarn.magnitude(yarn.mscale_all_dim) ** 2

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """Reads Hugging Face's configuration.

        Absent keys take the defaults that transformers gives the `model_type`: "deepseek_v32", "glm_moe_dsa", or
        "deepseek_v3", a dense model whose indexer is sized as DeepSeek-V3.2's unless the index keys are there. The
        compute, parameter and expert dtypes are not read: `load_hf` sets them.

        Args:
          source: a folder with a `config.json`, that file, or its contents.

        Raises:
          ValueError: one line that names the file and every key which changes the model and is unknown, stands there
            twice, contradicts another, or holds a value that this library does not implement.

        Examples:
          >>> Config.from_hf({"model_type": "deepseek_v32", "num_hidden_layers": 5}).num_moe_layers
          2
        """
        return cls(**read_fields(source, cls))

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers reads back to the same model.

        `index_fp8`, `index_kl_target`, `index_share_kl`, `latent_norm_eps` and the compute dtype have no key there;
        `torch_dtype` is the parameters', and experts in FP8 are a `quantization_config`. transformers fixes by the
        `model_type` how the indexer's rotary columns are paired: where layers share selections, which "glm_moe_dsa"
        alone has there, pairs half the width apart are another model to it.

        Raises:
          ValueError: for a `baseline`, which has no key there and without which it would be another model.
        """
        return to_json(self)

    @classmethod
    def deepseek_v32(cls, **overrides: Any) -> Self:
        """Gives the sizes of DeepSeek-V3.2-Exp, 671B parameters; `overrides` replace fields, as in `tiny`."""
        return _replace_fields(cls(bos_token_id=0, eos_token_id=(1,)), overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Gives the sizes of a model of 1.5 million parameters that trains on a laptop; bytes are its tokens.

        `overrides` replace fields; for one that is unknown, TypeError names those that are spelled alike.
        """
        config = cls(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=96,
            kv_lora_rank=48,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            index_n_heads=16,
            index_head_dim=32,
            index_topk=32,
            intermediate_size=384,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            rope_scaling=None,
            max_position_embeddings=4096,
            initializer_range=128**-0.5,  # at 0.02 it does not learn to recall in the few hundred steps of the demo
            dtype="float32",
        )
        return _replace_fields(config, overrides)


_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "index_kl_target": ("sum", "max"),
    "index_share_kl": ("mean", "own"),
    "baseline": ("none", "blocks", "window", "nsa"),
    "expert_dtype": (None, "fp8"),
}
_MAY_BE_ZERO = (  # all other integers are at least 1
    *("first_k_dense_replace", "n_shared_experts", "qk_rope_head_dim"),
    "num_nextn_predict_layers",
)
_HINTS = {"n_routed_experts": "; for a model without MoE layers set first_k_dense_replace = num_hidden_layers"}


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """Checks the type and range of a field's value, and gives it as a plain Python value."""
    name = field.name
    if field.type is int:
        return _integer(name, value, 0 if name in _MAY_BE_ZERO else 1)
    if name in ("bos_token_id", "pad_token_id"):
        return None if value is None else _integer(name, value, 0)
    if name == "eos_token_id":
        return tuple(_integer(name, each, 0) for each in (value if isinstance(value, tuple | list) else (value,)))
    if name == "indexer_types":
        if not isinstance(value, tuple | list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"indexer_types must be 'full' or 'shared' for each layer, got {shown(value)}")
        return tuple(value)
    if name == "latent_norm_eps" and value is None:
        return None
    if field.type is float or name == "latent_norm_eps":
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float | np.integer | np.floating)
            or not -MAX_FLOAT <= value <= MAX_FLOAT
        ):
            raise ValueError(f"{name} must be a finite number, got {shown(value)}")
        return float(value)
    if field.type is bool and not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    if name == "rope_scaling" and not isinstance(value, YaRN | None):
        raise ValueError(f"rope_scaling must be YaRN or None, got {shown(value)}")
    if name == "nsa" and not isinstance(value, NSASizes):
        raise ValueError(f"nsa must be NSASizes, got {shown(value)}")
    return _dtype_name(value) if field.type is str else value


def _integer(name: str, value: Any, least: int) -> int:
    """Checks an integer field."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if not least <= value <= MAX_INT:
        bound = f"at least {least}" if value < least else f"at most {MAX_INT}"
        raise ValueError(f"{name} must be {bound}, got {shown(int(value))}{_HINTS.get(name, '')}")
    return int(value)


def _dtype_name(dtype: Any) -> Any:
    """Names a dtype; what is none stays as it is, for the message of the error."""
    if isinstance(dtype, str) or dtype is None:
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


def _replace_fields[C: Config](config: C, overrides: Mapping[str, Any]) -> C:
    """Replaces fields of a config; raises TypeError for names that are none, with the names nearest to them."""
    names = [field.name for field in dataclasses.fields(config)]
    problems = []
    for name in overrides.keys() - set(names):
        close = difflib.get_close_matches(name, names, cutoff=0.75)
        problems.append(f"{name!r}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    if problems:
        raise TypeError(f"Config has no field {', '.join(sorted(problems))}")
    return dataclasses.replace(config, **overrides)
