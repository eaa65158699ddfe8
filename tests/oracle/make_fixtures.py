"""Makes the parity fixtures beside this file: tiny random DSA models as the reference implementation runs them.

Run once, under Python 3.11 with torch==2.13.0 (CPU) and transformers==5.23.0 (safetensors 0.8.0):

    python tests/oracle/make_fixtures.py [FOLDER [NAME …]]

Each folder holds a float32 checkpoint (`config.json`, safetensors) and `expected.safetensors`:

    tokens            i64 [B, T]
    logits            f32 [B, T, vocab]        attention over the selection
    dense_logits      f32 [B, T, vocab]        the same weights with index_topk >= T
    selected          i32 [layers, B, T, K]    increasing positions, then -1
    sparse_kl         f64 [layers, B, T]       KL(target || softmax of scores), both over the selected keys; where a
                                               layer reuses a selection, of the scores that made it
    dense_kl          f64 [layers, B, T]       the same over all causal keys, in the dense model
    sparse_grad/NAME, dense_grad/NAME  f32     gradient of sum over layers of mean over queries of the KL, by the
                                               indexer's parameters, under their checkpoint names; layers that share
                                               an indexer count as one, by KL to the mean of their targets

The reference scores keys without gradient, so KL and gradients are computed here in float64 from the inputs that its
indexers receive. The target is its own attention probabilities, summed over heads and normalised.
"""

# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

MIN_MARGIN = 1e-6  # between the last selected score and the next, relative to the row's largest; float32 error is 2e-7

SHAPE_A = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=8,
    max_position_embeddings=2560,
)
YARN_A = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=40.0,
    original_max_position_embeddings=64,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
SHAPE_B = dict(
    vocab_size=192,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    first_k_dense_replace=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    n_shared_experts=2,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=3,
    topk_group=2,
    norm_topk_prob=False,
    routed_scaling_factor=1.5,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=16,
    v_head_dim=24,
    index_n_heads=16,
    index_head_dim=24,
    index_topk=12,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
# Neither mscale nor mscale_all_dim: cosines and sines are then stretched and the softmax scale is not.
YARN_B = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=32)
SHAPE_GLM = dict(SHAPE_A, num_hidden_layers=2, n_group=1, topk_group=1, rms_norm_eps=1e-5, v_head_dim=24)
ROPE_GLM = dict(rope_type="default", rope_theta=1000000.0)
# Three layers with an indexer, of which the second serves dense and MoE layers, and the last a run to the end.
SHAPE_GLM_SHARED = dict(
    SHAPE_GLM,
    num_hidden_layers=7,
    first_k_dense_replace=2,
    indexer_types=["full", "full", "shared", "shared", "full", "shared", "shared"],
)

DEEPSEEK = DeepseekV32Config, DeepseekV32ForCausalLM
GLM = GlmMoeDsaConfig, GlmMoeDsaForCausalLM
# folder: classes, shape, rope, seed, queries
FIXTURES = {
    "deepseek_a0": (DEEPSEEK, SHAPE_A, YARN_A, 0, 64),
    "deepseek_a1": (DEEPSEEK, SHAPE_A, YARN_A, 1, 64),
    "deepseek_b": (DEEPSEEK, SHAPE_B, YARN_B, 2, 40),
    "glm": (GLM, SHAPE_GLM, ROPE_GLM, 3, 64),
    "glm_shared": (GLM, SHAPE_GLM_SHARED, ROPE_GLM, 4, 48),
}


def build(classes, shape, rope, seed):
    """A float32 model whose every parameter is random, norms and the router's selection bias included."""
    config = classes[0](**shape, rope_parameters=dict(rope), attn_implementation="eager")
    model = classes[1](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1.0 + 0.1 * noise)
            else:  # queries, keys and indexer larger, so that attention and scores are far from uniform
                tensor.copy_((0.2 if "indexer" in name or "_a_proj" in name or "q_b_proj" in name else 0.05) * noise)
        if shape.get("tie_word_embeddings"):
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def run(model, tokens, index_topk):
    """Logits, attention probabilities and, by layer, what its indexer received and selected, if it has one."""
    seen = [None] * len(model.model.layers)
    model.config.index_topk = index_topk
    hooks = []
    for number, layer in enumerate(model.model.layers):
        if layer.self_attn.indexer is None:
            continue

        def record(module, inputs, output, number=number):
            seen[number] = (module, *inputs[:3], output)

        layer.self_attn.indexer.index_topk = index_topk
        hooks.append(layer.self_attn.indexer.register_forward_hook(record))
    with torch.no_grad():
        out = model(tokens, output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return out.logits, out.attentions, seen


def rotate(x, cos, sin, interleaved):
    """Rotary embedding of the last axis, by neighbouring pairs or by halves."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def scores(hidden, q_latent, cos, sin, *, parameters, heads, rope_dim, interleaved):
    """I[t,s] = sum_j w[t,j] relu(q[t,j] . k[s]) in the dtype of the inputs, differentiable by `parameters`."""
    q = (q_latent @ parameters["wq_b.weight"].T).unflatten(-1, (heads, -1))
    dim = q.shape[-1]
    k = torch.nn.functional.layer_norm(
        hidden @ parameters["wk.weight"].T, (dim,), parameters["k_norm.weight"], parameters["k_norm.bias"], 1e-6
    )
    q = torch.cat([rotate(q[..., :rope_dim], cos[:, :, None], sin[:, :, None], interleaved), q[..., rope_dim:]], -1)
    k = torch.cat([rotate(k[..., :rope_dim], cos, sin, interleaved), k[..., rope_dim:]], -1)
    weights = (hidden @ parameters["weights_proj.weight"].T) * heads**-0.5 * dim**-0.5
    return torch.einsum("btj,btjs->bts", weights, torch.relu(torch.einsum("btje,bse->btjs", q, k)))


def divergence(index_scores, attention, allowed):
    """KL of each query between the head-summed, normalised attention and the softmax of the scores."""
    return divergence_of(index_scores, normalised(attention, allowed), allowed)


def normalised(attention, allowed):
    """The target of one layer."""
    target = torch.where(allowed, attention.double().sum(1), 0.0)
    return target / target.sum(-1, keepdim=True)


def divergence_of(index_scores, target, allowed):
    """KL of each query between a target and the softmax of the scores."""
    log_index = torch.log_softmax(index_scores.masked_fill(~allowed, -torch.inf), -1)
    return torch.where(allowed, torch.xlogy(target, target) - target * log_index.masked_fill(~allowed, 0.0), 0.0).sum(
        -1
    )


def canonical(indices, k):
    """Selections as increasing positions, then -1; the reference pads short rows with unreachable keys."""
    query = torch.arange(indices.shape[1])[None, :, None]
    size = indices.shape[1]
    kept = torch.where(indices <= query, indices.long(), size).sort(-1).values
    return torch.where(kept < size, kept, -1)[..., :k].to(torch.int32)


def check_margins(index_scores, k):
    """Raises if a selection hangs on rounding: choose another seed then."""
    causal = torch.tril(torch.ones(index_scores.shape[-2:], dtype=torch.bool))
    ranked = index_scores.masked_fill(~causal, -torch.inf).sort(-1, descending=True).values
    margin = (ranked[:, k:, k - 1] - ranked[:, k:, k]) / ranked[:, k:, 0].abs().clamp_min(1e-30)
    if margin.min() < MIN_MARGIN:
        raise SystemExit(f"a selection margin of {margin.min():.1e} is below {MIN_MARGIN}: choose another seed")
    return margin.min().item()


def stage(model, tokens, index_topk, interleaved):
    """One stage: logits, canonical selections, per-query KL [layers, B, T], gradients by checkpoint name."""
    logits, attentions, seen = run(model, tokens, index_topk)
    kls, selections, leaves, served = [], [], {}, []
    for layer, (record, attention) in enumerate(zip(seen, attentions, strict=True)):
        if record is not None:
            module, hidden, q_latent, (cos, sin), indices = record
            prefix = f"model.layers.{layer}.self_attn.indexer."
            parameters = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
            leaves |= {prefix + name: p for name, p in parameters.items()}
            half = cos.shape[-1] // 2
            inputs = [x.detach().double() for x in (hidden, q_latent, cos[..., :half], sin[..., :half])]
            sizes = dict(heads=module.n_heads, rope_dim=module.qk_rope_head_dim)
            index_scores = scores(*inputs, parameters=parameters, interleaved=interleaved, **sizes)
            length = tokens.shape[1]
            allowed = torch.tril(torch.ones(length, length, dtype=torch.bool)).expand(tokens.shape[0], -1, -1)
            if index_topk < length:
                allowed = allowed & torch.zeros_like(allowed).scatter(-1, indices.long(), True)
                margin = check_margins(index_scores.detach(), index_topk)
                print(f"  layer {layer}: smallest selection margin {margin:.1e}")
            served.append((index_scores, allowed, []))
        served[-1][2].append(normalised(attention, allowed))
        kls.append(divergence(index_scores, attention, allowed).detach())
        selections.append(canonical(indices, index_topk))
    loss = sum(
        divergence_of(index_scores, torch.stack(targets).mean(0), allowed).mean()
        for index_scores, allowed, targets in served
    )
    loss.backward()
    gradients = {name: p.grad.float() for name, p in leaves.items()}
    assert all(g.abs().max() > 0 for g in gradients.values())
    return logits, torch.stack(selections), torch.stack(kls), gradients


def publish_spelling(config):
    """The configuration as the published DeepSeek-V3.2 checkpoint spells it."""
    dropped = (
        "rope_parameters mlp_layer_types layer_types qk_head_dim head_dim mlp_bias dtype output_router_logits".split()
    )
    rope = {"type" if key == "rope_type" else key: value for key, value in config["rope_parameters"].items()}
    config = {key: value for key, value in config.items() if key not in dropped}
    return config | {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "torch_dtype": "float32",
        "transformers_version": "4.44.2",
    }


def make(folder, classes, shape, rope, seed, length):
    """Writes one fixture."""
    print(folder.name)
    model = build(classes, shape, rope, seed)
    tokens = torch.randint(0, shape["vocab_size"], (2, length), generator=torch.Generator().manual_seed(100 + seed))
    interleaved = classes is GLM
    logits, selected, sparse_kl, sparse_grad = stage(model, tokens, shape["index_topk"], interleaved)
    dense_logits, _, dense_kl, dense_grad = stage(model, tokens, length, interleaved)
    model.config.index_topk = shape["index_topk"]
    model.save_pretrained(folder, max_shard_size="150KB" if folder.name == "deepseek_b" else "5GB")
    (folder / "generation_config.json").unlink()
    if folder.name == "deepseek_a0":
        path = folder / "config.json"
        path.write_text(json.dumps(publish_spelling(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")
        reloaded, _, _ = run(
            classes[1].from_pretrained(folder, attn_implementation="eager"), tokens, shape["index_topk"]
        )
        assert torch.equal(reloaded, logits)
    expected = dict(tokens=tokens, logits=logits, dense_logits=dense_logits, selected=selected)
    expected |= dict(sparse_kl=sparse_kl, dense_kl=dense_kl)
    expected |= {f"sparse_grad/{name}": g for name, g in sparse_grad.items()}
    expected |= {f"dense_grad/{name}": g for name, g in dense_grad.items()}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name in sys.argv[2:] or FIXTURES:
        make(root / name, *FIXTURES[name])
