"""Holds the model's configuration, its Hugging Face spelling, and the letters that name every dimension.

Letter table, used in every signature, einsum and comment:

    B batch                  T queries                S keys                   K selected keys
    N attention heads        J index heads            E index head dim         D model dim
    Q query latent           C key/value latent       R rotary dim             P un-rotated head dim
    V value head dim         X experts                F feed-forward width
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class YaRN:
    """YaRN: how rotary frequencies stretch past the length that they were trained on.

    The softmax scale is multiplied by `magnitude(mscale_all_dim) ** 2`; cosines and sines are multiplied by
    `magnitude(mscale) / magnitude(mscale_all_dim)`, which is 1 in every published DSA model.

    References:
      Peng et al., arXiv:2309.00071.
    """

    factor: float  # new length over trained length, at least 1
    original_max_position_embeddings: int  # tokens
    beta_fast: float = 32.0  # rotations over the trained length, above which a frequency is left as it is
    beta_slow: float = 1.0  # rotations over the trained length, below which a frequency is divided by `factor`
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        for name in ("factor", "original_max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"rope_scaling {name} must be at least 1, got {getattr(self, name)}")

    def magnitude(self, mscale: float) -> float:
        """Computes 0.1 · mscale · ln(factor) + 1, by whose square longer contexts sharpen the softmax."""
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and choices of a DSA transformer.

    Fields are named as in Hugging Face's `config.json`; defaults are the published 671B model. Normalisations, softmax,
    router, index weights and losses are float32 whatever `dtype` and `param_dtype` say.

    Raises:
      ValueError: if sizes are out of range or do not fit each other, naming the field.

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
    qk_rope_head_dim: int = 64  # R
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
    rope_theta: float = 10000.0
    rope_scaling: YaRN | None = YaRN(40.0, 4096)
    max_position_embeddings: int = 163840  # tokens of a sequence, at most
    initializer_range: float = 0.02  # standard deviation of new parameters
    tie_word_embeddings: bool = False
    index_rope_interleave: bool = False  # True in GLM-5, whose indexer pairs neighbouring columns
    index_fp8: bool = False  # Hadamard transform and e4m3 index queries and keys
    dtype: str = "bfloat16"  # of the computation
    param_dtype: str = "float32"  # of the parameters

    def __post_init__(self):
        self._check_values()
        self._check_experts()

    def _check_values(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if field.type is int and value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be 'float32' or 'bfloat16', got {getattr(self, name)!r}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim must be at least qk_rope_head_dim, got {self.index_head_dim} < {self.qk_rope_head_dim}"
            )
        if self.index_fp8 and self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_fp8 needs index_head_dim a power of two, got {self.index_head_dim}")

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
        compute and parameter dtypes are not read: `load_hf` sets them.

        Args:
          source: a folder with a `config.json`, that file, or its contents.

        Raises:
          ValueError: one that names every key which changes the model and is unknown, or holds a value that this
            library does not implement.

        Examples:
          >>> Config.from_hf({"model_type": "deepseek_v32", "num_hidden_layers": 5}).num_moe_layers
          2
        """
        data = dict(source) if isinstance(source, Mapping) else read_json(Path(source))
        fields, problems = _translate(data)
        if problems:
            raise ValueError("this configuration is not supported: " + "; ".join(problems))
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers reads back to the same model.

        `index_fp8` and the compute dtype have no key there; `torch_dtype` is the parameters'.
        """
        model_type = "glm_moe_dsa" if self.index_rope_interleave else "deepseek_v32"
        rope = {"rope_theta": self.rope_theta, "rope_scaling": None}
        if self.rope_scaling is not None:
            rope["rope_scaling"] = {"type": "yarn", **_yarn_to_hf(self.rope_scaling)}
        elif self.index_rope_interleave:
            rope = {"rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}}
        interleave = {"indexer_rope_interleave": True} if self.index_rope_interleave else {}
        return {
            "architectures": [_ARCHITECTURES[model_type]],
            "model_type": model_type,
            **{name: getattr(self, name) for name in _HF_FIELDS},
            **rope,
            **interleave,
            **{key: _REQUIRED[key] for key in "attention_bias attention_dropout hidden_act".split()},
            **{key: _REQUIRED[key] for key in "moe_layer_freq scoring_func topk_method".split()},
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
            "torch_dtype": self.param_dtype,
            "use_cache": True,
        }

    @classmethod
    def deepseek_v32(cls, **overrides: Any) -> Self:
        """Gives the sizes of DeepSeek-V3.2-Exp, 671B parameters; `overrides` replace fields, as in `tiny`."""
        return _replace_fields(cls(), overrides)

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


_MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts")  # all other integers are at least 1


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


_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}

# Fields that `config.json` lacks, or spells otherwise.
_OURS = {"rope_theta", "rope_scaling", "index_rope_interleave", "index_fp8", "dtype", "param_dtype"}
# Fields that `config.json` spells as we do, and their types.
_HF_FIELDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Config) if field.name not in _OURS}

# What transformers assumes for absent keys where it differs from DeepSeek-V3.2, whose values are Config's own.
_DEFAULTS = {
    "deepseek_v3": {"max_position_embeddings": 4096},
    "glm_moe_dsa": {
        "vocab_size": 154880,
        "hidden_size": 6144,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "intermediate_size": 12288,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752,
    },
}

# Keys that would change the model, with the one value that this library implements; null means it too, except below.
_REQUIRED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "partial_rotary_factor": 1.0,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

# Keys whose null is another model: queries without a latent, which the indexer reads; gates that do not sum to one;
# half-split rotation in the attention.
_NEVER_NULL = ("q_lora_rank", "norm_topk_prob", "rope_interleave")

# Keys read beside the fields, and their types.
_READ = {
    "model_type": str,
    "rope_theta": float,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "num_key_value_heads": int,
    "mlp_layer_types": list,
    "layer_types": list,
    "indexer_types": list,
    "index_topk_freq": int,
    "index_topk_pattern": str | list,
    "index_skip_topk_offset": int,
    "indexer_rope_interleave": bool,
    "quantization_config": dict,
}

# Keys that do not change the model: token ids, file and library bookkeeping, widths that follow from others, and what
# concerns training losses of others or the prediction layers past the last, which are not loaded.
_IGNORED = frozenset(
    "_name_or_path architectures auto_map aux_loss_alpha bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "ep_size head_dim id2label index_share_for_mtp_iteration label2id name_or_path num_nextn_predict_layers "
    "output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type qk_head_dim "
    "return_dict router_aux_loss_coef seq_aux tokenizer_class torch_dtype transformers_version use_cache".split()
)

_YARN_KEYS = "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, given itself or its folder; raises ValueError if it is not there or no JSON object."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"expected a folder with a config.json, or such a file, got {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _translate(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translates the keys of a `config.json` into Config's arguments, and lists what is wrong with them."""
    model_type = data.get("model_type")
    if model_type not in _ARCHITECTURES:
        return {}, [f"model_type must be one of {sorted(_ARCHITECTURES)}, got {model_type!r}"]
    glm = model_type == "glm_moe_dsa"
    known = _HF_FIELDS.keys() | _REQUIRED.keys() | _READ.keys() | _IGNORED
    problems = [f"unknown key {key} = {data[key]!r}" for key in sorted(data.keys() - known) if data[key] is not None]
    problems += [f"{key} must not be null" for key in _NEVER_NULL if key in data and data[key] is None]
    fields: dict[str, Any] = dict(_DEFAULTS.get(model_type, {}))
    fields["index_rope_interleave"] = glm
    fields |= {name: data[name] for name in _HF_FIELDS if data.get(name) is not None}
    for key, kind in {**_HF_FIELDS, **_READ}.items():
        if data.get(key) is not None and not _is_a(data[key], kind):
            problems.append(f"{key} must be of type {getattr(kind, '__name__', kind)}, got {data[key]!r}")
    for key, value in _REQUIRED.items():
        if data.get(key) not in (None, value):
            problems.append(f"{key} must be {value!r}, got {data[key]!r}")
    if problems:  # what follows computes with the fields
        return fields, problems
    fields = {name: float(value) if _HF_FIELDS.get(name) is float else value for name, value in fields.items()}
    fields["rope_theta"], fields["rope_scaling"], rope_problems = _read_rope(data, fields)
    fields["first_k_dense_replace"], layer_problems = _read_layers(data, fields)
    return fields, rope_problems + layer_problems + _check_heads_and_blocks(data, fields)


def _is_a(value: Any, kind: Any) -> bool:
    """Tells whether a JSON value is of a type; integers pass as floats, booleans as themselves alone."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _field(fields: dict[str, Any], name: str) -> Any:
    """Looks up a field, Config's default where the file does not give it."""
    return fields.get(name, getattr(Config, name))


def _read_rope(data, fields) -> tuple[float, YaRN | None, list[str]]:
    """Reads theta, YaRN and their problems: from `rope_theta` and `rope_scaling`, or `rope_parameters` with both."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", data.get("rope_theta") or 10000.0)
    old_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_type)
    problems = []
    if not _is_a(theta, float) or theta <= 0:
        theta, problems = 10000.0, [f"rope_theta must be a number above 0, got {theta!r}"]
    for key, value in {"partial_rotary_factor": 1.0, "truncate": True}.items():
        if rope.pop(key, value) != value:
            problems.append(f"{key} of the rotary embedding must be {value!r}")
    if kind not in ("default", "yarn"):
        return theta, None, [*problems, f"rope_type must be 'default' or 'yarn', got {kind!r}"]
    known = [*_YARN_KEYS, "attention_factor"] if kind == "yarn" else []
    problems += [f"unknown rotary key {key} = {rope[key]!r}" for key in sorted(rope.keys() - set(known))]
    problems += [f"rotary key {key} must be a number, got {v!r}" for key, v in rope.items() if not _is_a(v, float)]
    if kind == "default" or problems:
        return float(theta), None, problems
    yarn, problems = _read_yarn(rope, _field(fields, "max_position_embeddings"))
    return float(theta), yarn, problems


def _read_yarn(rope: dict[str, Any], max_position_embeddings: int) -> tuple[YaRN | None, list[str]]:
    """Reads YaRN as transformers does, where `attention_factor` multiplies cosines and sines.

    Absent, it is the ratio of both magnitudes if `mscale` and `mscale_all_dim` are given and not 0, and else the
    magnitude of 1; an absent `mscale_all_dim` leaves the softmax scale alone. Our two numbers can say all of these.
    """
    original = rope.get("original_max_position_embeddings") or max_position_embeddings
    factor = rope.get("factor") or max_position_embeddings / original
    arguments = {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}
    mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if factor < 1:
        return None, [f"rotary factor must be at least 1, got {factor}"]
    yarn = YaRN(factor, original, **arguments, mscale=mscale or 1.0, mscale_all_dim=all_dim)
    stretch = rope.get("attention_factor")
    if stretch is None:
        if all_dim == 0 or (mscale and all_dim):
            return dataclasses.replace(yarn, mscale=mscale if all_dim else 1.0), []
        stretch = yarn.magnitude(1.0)
    if stretch == yarn.magnitude(yarn.mscale) / yarn.magnitude(all_dim):
        return yarn, []
    if factor == 1:
        return yarn, [f"attention_factor must be 1 where factor is 1, got {stretch}"]
    mscale = (stretch * yarn.magnitude(all_dim) - 1.0) / (0.1 * math.log(factor))
    return dataclasses.replace(yarn, mscale=mscale), []


def _yarn_to_hf(yarn: YaRN) -> dict[str, float]:
    """Gives the keys of `rope_scaling`; `attention_factor` only where transformers would infer another."""
    keys = dataclasses.asdict(yarn)
    stretch = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
    inferred = stretch if yarn.mscale and yarn.mscale_all_dim else yarn.magnitude(1.0)
    return keys if stretch == inferred else {**keys, "attention_factor": stretch}


def _read_layers(data, fields) -> tuple[int, list[str]]:
    """Counts the dense layers before the MoE layers, by `mlp_layer_types` if it is there, and lists the problems."""
    layers, dense = _field(fields, "num_hidden_layers"), _field(fields, "first_k_dense_replace")
    problems = []
    types = data.get("mlp_layer_types")
    if types is not None:
        listed = len(types) - list(reversed(types)).index("dense") if "dense" in types else 0
        if list(types) != ["dense"] * listed + ["sparse"] * (layers - listed):
            problems.append(f"mlp_layer_types must be {layers} layers, 'dense' first and then 'sparse', got {types}")
        dense = dense if listed == min(dense, layers) else listed
    types = data.get("layer_types") or ()
    strange = set(types) - {"indexed_attention", "deepseek_sparse_attention"}
    if strange or len(types) not in (0, layers):
        problems.append(f"layer_types must be 'indexed_attention' for all {layers} layers, got {types}")
    types = _indexer_types(data, layers)
    if types != ["full"] * layers:
        problems.append(
            "indexer_types (or index_topk_pattern, index_topk_freq) must be 'full' for every layer, for sharing a "
            f"selection among layers is not supported, got {types}"
        )
    return dense, problems


def _indexer_types(data: dict[str, Any], layers: int) -> list[str]:
    """Lists whether each layer has an indexer ("full") or takes an earlier layer's selection ("shared")."""
    if data.get("indexer_types") is not None:
        return list(data["indexer_types"])
    if data.get("index_topk_pattern") is not None:
        letters = {"F": "full", "S": "shared"}
        return [letters.get(letter) or letter for letter in data["index_topk_pattern"]]
    every, offset = max(data.get("index_topk_freq") or 1, 1), data.get("index_skip_topk_offset", 2)
    return ["shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(layers)]


def _check_heads_and_blocks(data, fields) -> list[str]:
    """Lists what is wrong with keys that must agree with others, and with the blocks of an FP8 checkpoint."""
    problems = []
    heads = _field(fields, "num_attention_heads")
    if data.get("num_key_value_heads") not in (None, heads):
        problems.append(f"num_key_value_heads must be num_attention_heads = {heads}, got {data['num_key_value_heads']}")
    interleave = fields["index_rope_interleave"]
    if data.get("indexer_rope_interleave") not in (None, interleave):
        problems.append(f"indexer_rope_interleave must be {interleave} for {data['model_type']}")
    quantization = data.get("quantization_config") or {}
    expected = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    for key, value in expected.items():
        if quantization and quantization.get(key, value if key == "fmt" else None) != value:
            problems.append(f"quantization_config {key} must be {value!r}, got {quantization.get(key)!r}")
    return problems
