"""Translates between Hugging Face's `config.json` and the fields of `dsa_jax.Config`, key by key.

Every key is known: it is a field, it must have the one value that this library implements, or it does not matter. All
that is wrong is listed, nothing is guessed.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_jax.strict_json import one_line, read_object, shown, shown_name, shown_path
from dsa_jax.yarn import MAX_FLOAT, YaRN

MAX_INT = 2**31 - 1  # sizes and positions are int32
MAX_LAYERS = 10_000

_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}

# Fields that `config.json` lacks, or spells otherwise. All others it spells as we do.
_OURS = frozenset(
    "rope_theta rope_scaling index_rope_interleave indexer_types index_share_kl index_fp8 index_kl_target baseline "
    "latent_norm_eps block_size nsa bos_token_id eos_token_id pad_token_id dtype param_dtype expert_dtype".split()
)

# What a `quantization_config` must say: e4m3 weights with one scale for each block of 128 × 128.
FP8_FORMAT = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}

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

# What transformers assumes for absent token ids, whatever the model.
_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}

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
    "bos_token_id": int,
    "eos_token_id": int | list,
    "pad_token_id": int,
}

# Keys that do not change the model: file and library bookkeeping, widths that follow from others, and what concerns
# training losses of others, or how an engine chains its drafts.
_IGNORED = frozenset(
    "_name_or_path architectures auto_map aux_loss_alpha chunk_size_feed_forward dtype ep_size head_dim id2label "
    "index_share_for_mtp_iteration label2id name_or_path output_attentions "
    "output_hidden_states output_router_logits pretraining_tp problem_type qk_head_dim return_dict "
    "router_aux_loss_coef seq_aux tokenizer_class torch_dtype transformers_version use_cache".split()
)

_YARN_KEYS = "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, given itself or its folder; raises ValueError if it is not there or no JSON object."""
    file = _config_file(path)
    if not file.is_file():
        run = "; a run's folder becomes one by dsa-jax export" if (path / "run.json").is_file() else ""
        raise ValueError(f"expected a folder with a config.json, or such a file, got {shown_path(path)}{run}")
    return read_object(file)


def _config_file(path: Path) -> Path:
    """Finds the `config.json` of a folder, or takes the file as it is."""
    return path / "config.json" if path.is_dir() else path


def read_fields(source: str | Path | Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Reads a `config.json` as the arguments of `config`, the class `Config`.

    Raises:
      ValueError: one line that names the file and every key that is not supported.
    """
    where = "this configuration" if isinstance(source, Mapping) else shown_path(_config_file(Path(source)))
    data = dict(source) if isinstance(source, Mapping) else read_json(Path(source))
    fields, problems = _translate(data, config)
    if not problems:
        try:
            config(**fields)
        except ValueError as error:
            problems = [str(error)]
    if problems:
        raise ValueError(one_line(f"{where} is not supported", problems))
    return fields


def to_json(config: Any) -> dict[str, Any]:
    """Gives the contents of the `config.json` of a `Config`.

    Raises:
      ValueError: for a baseline, which has no key there.
    """
    if config.baseline != "none":
        raise ValueError(
            f"config.json has no key for baseline={config.baseline!r}, without which it would be another model: "
            "such a model is not saved in Hugging Face's layout"
        )
    glm = config.index_rope_interleave or bool(config.indexer_types)
    model_type = "glm_moe_dsa" if glm else "deepseek_v32"
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_scaling is not None:
        rope["rope_scaling"] = {"type": "yarn", **_yarn_to_json(config.rope_scaling)}
    elif glm:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    stops = list(config.eos_token_id)
    return {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in _kinds(config)},
        **rope,
        **({"indexer_rope_interleave": config.index_rope_interleave} if glm else {}),
        **({"indexer_types": list(config.indexer_types)} if config.indexer_types else {}),
        **{key: _REQUIRED[key] for key in "attention_bias attention_dropout hidden_act".split()},
        **{key: _REQUIRED[key] for key in "moe_layer_freq scoring_func topk_method".split()},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops if len(stops) > 1 else stops[0] if stops else None,
        "pad_token_id": config.pad_token_id,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
        **({"quantization_config": fp8_experts(config)} if config.expert_dtype == "fp8" else {}),
    }


def fp8_experts(config: Any) -> dict[str, Any]:
    """Gives the `quantization_config` of a checkpoint with routed experts alone in FP8: it names all other modules.

    A name stands for all modules whose names begin with it.
    """
    others = ["lm_head"]
    for layer in range(config.num_hidden_layers):
        is_dense = layer < config.num_dense_layers
        parts = ("self_attn", "mlp") if is_dense else ("self_attn", "mlp.gate", "mlp.shared_experts")
        others += [f"model.layers.{layer}.{part}" for part in parts]
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        parts = "self_attn", "mlp.gate", "mlp.shared_experts", "eh_proj"
        others += [f"model.layers.{layer}.{part}" for part in parts]
    return {**FP8_FORMAT, "activation_scheme": "dynamic", "modules_to_not_convert": others}


def _kinds(config: Any) -> dict[str, Any]:
    """Lists the fields that `config.json` spells as `Config` does, and their types."""
    return {field.name: field.type for field in dataclasses.fields(config) if field.name not in _OURS}


def _translate(data: dict[str, Any], config: Any) -> tuple[dict[str, Any], list[str]]:
    """Translates the keys of a `config.json` into Config's arguments, and lists what is wrong with them."""
    strange = [key for key in data if not isinstance(key, str)]
    if strange:
        return {}, [f"keys must be strings, got {shown(strange[0])}"]
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        return {}, [f"model_type must be one of {sorted(_ARCHITECTURES)}, got {shown(model_type)}"]
    kinds = _kinds(config)
    problems = _check_keys(data, kinds)
    fields: dict[str, Any] = dict(_DEFAULTS.get(model_type, {}))
    interleave = data.get("indexer_rope_interleave")
    fields["index_rope_interleave"] = model_type == "glm_moe_dsa" if interleave is None else interleave
    fields |= {name: data[name] for name in kinds if data.get(name) is not None}
    if problems:  # what follows computes with the fields
        return fields, problems
    fields = {name: float(value) if kinds.get(name) is float else value for name, value in fields.items()}
    full = {field.name: field.default for field in dataclasses.fields(config)} | fields
    fields["rope_theta"], fields["rope_scaling"], rope_problems = _read_rope(data, full)
    fields["first_k_dense_replace"], layer_problems = _read_layers(data, full)
    fields["indexer_types"], type_problems = _read_indexer_types(data, full)
    layer_problems += type_problems
    ids, id_problems = _read_token_ids(data)
    return fields | ids, rope_problems + layer_problems + _check_heads_and_blocks(data, full) + id_problems


def _check_keys(data: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    """Lists the keys that are unknown, of another type, or hold a value that is not implemented."""
    known = kinds.keys() | _REQUIRED.keys() | _READ.keys() | _IGNORED
    unknown = [key for key in sorted(data.keys() - known) if data[key] is not None]
    problems = [f"unknown key {shown_name(key)} = {shown(data[key])}" for key in unknown]
    problems += [f"{key} must not be null" for key in _NEVER_NULL if key in data and data[key] is None]
    for key, kind in {**kinds, **_READ}.items():
        if data.get(key) is not None and not _is_a(data[key], kind):
            problems.append(f"{key} must be {_described(kind)}, got {shown(data[key])}")
    for key, value in _REQUIRED.items():
        given = data.get(key)
        if given is not None and not _equals(given, value):
            problems.append(f"{key} must be {value!r}, got {shown(given)}")
    for key in ("num_hidden_layers", "num_nextn_predict_layers"):
        layers = data.get(key)
        if isinstance(layers, int) and MAX_LAYERS < layers <= MAX_INT:
            problems.append(f"{key} must be at most {MAX_LAYERS:,}, got {layers:,}")
    return problems


def _is_a(value: Any, kind: Any) -> bool:
    """Tells whether a JSON value is of a type: integers pass as floats, booleans as themselves, numbers if finite."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int | float) and not -MAX_FLOAT <= value <= MAX_FLOAT:
        return False
    if isinstance(value, int) and kind is not float and abs(value) > MAX_INT:
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _described(kind: Any) -> str:
    """Describes the values of a type."""
    numbers = {int: f"of type int, at most {MAX_INT:,}", float: "a finite number"}
    return numbers.get(kind) or f"of type {getattr(kind, '__name__', kind)}"


def _equals(value: Any, required: Any) -> bool:
    """Tells whether a JSON value is the required one; booleans are no numbers, but 0 is 0.0."""
    return isinstance(value, bool) == isinstance(required, bool) and value == required


def _read_token_ids(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Reads the token ids, of which the one that stops may be several, and lists the problems."""
    ids = {key: data.get(key, default) for key, default in _TOKEN_IDS.items()}
    stops = ids["eos_token_id"]
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    wrong = [stop for stop in stops if not _is_a(stop, int)]
    if wrong:
        return {}, [f"eos_token_id must hold token ids, got {shown(wrong[0])}"]
    return ids | {"eos_token_id": tuple(stops)}, []


def _read_rope(data: dict[str, Any], fields: dict[str, Any]) -> tuple[float, YaRN | None, list[str]]:
    """Reads theta, YaRN and their problems.

    They stand in `rope_theta` and `rope_scaling`, or in `rope_parameters`, or in both: what one of them lacks the other
    gives, and where they contradict each other both values are named.
    """
    kind, rope, problems = _merge_rope(data)
    theta = rope.pop("rope_theta", 10000.0)
    if not _is_a(theta, float) or theta <= 1:
        theta, problems = 10000.0, [*problems, f"rope_theta must be a number above 1, got {shown(theta)}"]
    for key, value in {"partial_rotary_factor": 1.0, "truncate": True}.items():
        if not _equals(rope.pop(key, value), value):
            problems.append(f"{key} of the rotary embedding must be {value!r}")
    if kind not in ("default", "yarn"):
        return theta, None, [*problems, f"rope_type must be 'default' or 'yarn', got {shown(kind)}"]
    known = [*_YARN_KEYS, "attention_factor"] if kind == "yarn" else []
    unknown = sorted(rope.keys() - set(known))
    problems += [f"unknown rotary key {shown_name(key)} = {shown(rope[key])}" for key in unknown]
    problems += [
        f"rotary key {key} must be a finite number, got {shown(rope[key])}"
        for key in rope.keys() & set(known)
        if not _is_a(rope[key], float)
    ]
    if kind == "default" or problems:
        return float(theta), None, problems
    try:
        return float(theta), *_read_yarn(rope, fields["max_position_embeddings"])
    except ValueError as error:
        return float(theta), None, [str(error)]


def _merge_rope(data: dict[str, Any]) -> tuple[Any, dict[str, Any], list[str]]:
    """Merges the rotary settings of all spellings: their type, the other keys, and what contradicts itself.

    A "default" beside another type only says that the other spelling has the base.
    """
    spelled = {key: data.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    values: dict[str, list[tuple[str, Any]]] = {}  # by key: where it stands, and its value
    if data.get("rope_theta") is not None:
        values["rope_theta"] = [("rope_theta", data["rope_theta"])]
    kinds: list[tuple[str, Any]] = []
    problems = []
    for name, rope in spelled.items():
        types = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
        if len(types) == 2 and types[0] != types[1]:
            problems.append(f"{name} has rope_type {shown(types[0])} and type {shown(types[1])}, which must agree")
        kinds += [(name, kind) for kind in types[:1] if kind != "default"]
        for key, value in rope.items():
            if value is not None and key not in ("type", "rope_type"):
                values.setdefault(key, []).append((f"{name}.{key}", value))
    for places in ([("type of " + name, kind) for name, kind in kinds], *values.values()):
        for place, value in places[1:]:
            if value != places[0][1]:
                problems.append(f"{places[0][0]} {shown(places[0][1])} contradicts {place} {shown(value)}")
    return kinds[0][1] if kinds else "default", {key: places[0][1] for key, places in values.items()}, problems


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
    if factor == 1 or stretch <= 0:
        needed = "1 where factor is 1" if factor == 1 else "above 0"
        return yarn, [f"attention_factor must be {needed}, got {stretch}"]
    mscale = (stretch * yarn.magnitude(all_dim) - 1.0) / (0.1 * math.log(factor))
    return dataclasses.replace(yarn, mscale=mscale), []


def _yarn_to_json(yarn: YaRN) -> dict[str, float]:
    """Gives the keys of `rope_scaling`; `attention_factor` only where transformers would infer another."""
    keys = dataclasses.asdict(yarn)
    stretch = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
    inferred = stretch if yarn.mscale and yarn.mscale_all_dim else yarn.magnitude(1.0)
    return keys if stretch == inferred else {**keys, "attention_factor": stretch}


def _read_layers(data: dict[str, Any], fields: dict[str, Any]) -> tuple[int, list[str]]:
    """Counts the dense layers before the MoE layers, by `mlp_layer_types` if it is there, and lists the problems."""
    layers, dense = fields["num_hidden_layers"], fields["first_k_dense_replace"]
    problems = []
    types = data.get("mlp_layer_types")
    if types is not None:
        listed = len(types) - types[::-1].index("dense") if "dense" in types else 0
        if types != ["dense"] * listed + ["sparse"] * (layers - listed):
            problems.append(
                f"mlp_layer_types must be {layers} layers, 'dense' first and then 'sparse', got {shown(types)}"
            )
        dense = dense if listed == min(dense, layers) else listed
    types = data.get("layer_types") or []
    strange = [kind for kind in types if kind not in ("indexed_attention", "deepseek_sparse_attention")]
    if strange or len(types) not in (0, layers):
        problems.append(f"layer_types must be 'indexed_attention' for all {layers} layers, got {shown(types)}")
    return dense, problems


def _read_indexer_types(data: dict[str, Any], fields: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Reads whether each layer has an indexer ("full") or reuses an earlier layer's selection ("shared").

    `indexer_types` says so layer by layer, `index_topk_pattern` in letters F and S or in those words. Else the first
    `index_skip_topk_offset` layers are full, 2 if that is absent, and of the others every `index_topk_freq`-th counted
    from the last of those. An explicit list stands above a rule, as in transformers.
    """
    spellings = {key: data[key] for key in ("indexer_types", "index_topk_pattern") if data.get(key) is not None}
    layers, letters = fields["num_hidden_layers"], {"F": "full", "S": "shared"}
    read = {key: tuple(letters.get(str(kind), str(kind)) for kind in types) for key, types in spellings.items()}
    every, offset = data.get("index_topk_freq"), data.get("index_skip_topk_offset")
    every, offset = 1 if every is None else every, 2 if offset is None else offset
    if every < 1 or offset < 0:
        wanted = "index_topk_freq must be at least 1 and index_skip_topk_offset at least 0"
        return (), [f"{wanted}, got {every} and {offset}"]
    for key, types in read.items():
        if len(types) != layers or types[0] != "full" or set(types) - {"full", "shared"}:
            wanted = f"{key} must be 'full' or 'shared' for each of the {layers} layers, the first of them 'full'"
            return (), [f"{wanted}, got {shown(spellings[key])}"]
    if len(set(read.values())) > 1:
        return (), ["indexer_types contradicts index_topk_pattern: leave one of them out"]
    by_rule = tuple("shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(layers))
    return next(iter(read.values()), by_rule), []


def _check_heads_and_blocks(data: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    """Lists what is wrong with keys that must agree with others, and with the blocks of an FP8 checkpoint."""
    problems = []
    heads = fields["num_attention_heads"]
    if data.get("num_key_value_heads") not in (None, heads):
        problems.append(f"num_key_value_heads must be num_attention_heads = {heads}, got {data['num_key_value_heads']}")
    quantization = data.get("quantization_config") or {}
    for key, value in FP8_FORMAT.items():
        given = quantization.get(key, value if key == "fmt" else None)
        if quantization and given != value:
            problems.append(f"quantization_config {key} must be {value!r}, got {shown(given)}")
    return problems
