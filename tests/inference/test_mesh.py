"""Generation on a mesh gives what one device gives: tokens, log-probabilities, selections and experts."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from cases import FAST, same_bits, unchecked
from flax import nnx
from model_cases import small_config, small_model
from sharded_cases import mesh_of, place_params

from dsa_jax import KeyRange, PagedCache, load_hf, save_hf
from dsa_jax.cache import Pages
from dsa_jax.inference import Completions, Runner, complete, generate
from dsa_jax.inference.programs import Rows, _forward_on
from dsa_jax.parallel.sharding import parameter_shardings, spec

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_attention_heads=8, moe_intermediate_size=24, max_position_embeddings=640)  # K = 8
FP8 = small_config(num_attention_heads=8, moe_intermediate_size=24, max_position_embeddings=640, index_fp8=True)
LENGTHS = 5, 530, 70, 9, 130, 64, 3, 33, 8, 66  # about K, about a page of 64, and on all of eight shards of pages
ROWS = len(LENGTHS)
PROMPTS = [np.random.default_rng(length).integers(64, size=length).tolist() for length in LENGTHS]
NEW, CHUNK = 6, 64
PAGES = 16  # of each shard, as many as `complete` makes for these prompts: the same pools take the same programs
RETURNED: dict[str, Any] = dict(return_selected=True, return_routed=True)
FEW = 3  # rows: fewer than shards

CET, DCT, DT = "context=2,expert=2,tensor=2", "data=2,context=2,tensor=2", "data=4,tensor=2"
meshes = lambda *names: [pytest.param(name, marks=pytest.mark.meshes) for name in names]


def on_mesh(config, mesh):
    """The random model, its parameters where a mesh has them."""
    graph, state = nnx.split(small_model(config))
    return nnx.merge(graph, place_params(state, mesh))


def run(model, rows=ROWS, **options) -> Completions:
    """Continues the first prompts: even rows by their likeliest tokens, odd ones at random."""
    settings: dict[str, Any] = dict(max_new_tokens=NEW, prefill_chunk=CHUNK) | RETURNED
    settings |= dict(temperature=np.where(np.arange(rows) % 2, 0.7, 0.0), seed=3)
    return complete(model, PROMPTS[:rows], **settings | options)


@functools.cache
def alone(config=CONFIG, **options) -> Completions:
    return run(small_model(config), **options)


def check(mesh, config=CONFIG, rows=ROWS, **options):
    """Holds the first rows on a mesh against the same rows of one device."""
    mesh, want = mesh_of(mesh), alone(config, **options)
    out = run(on_mesh(config, mesh), rows, mesh=mesh, **options)
    same_bits(out.tokens, want.tokens[:rows])
    assert len(set(out.tokens.reshape(-1).tolist())) > 5, "a constant continuation shows nothing"
    np.testing.assert_allclose(out.log_probs, want.log_probs[:rows], atol=1e-5)
    for actual, expected, width in ((out.selected, want.selected, 8), (out.routed, want.routed, 2)):
        assert actual is not None and expected is not None
        for length, x, y in zip(LENGTHS[:rows], actual, expected[:rows], strict=True):
            assert x.shape == (2, length + NEW - 1, width)
            same_bits(x, y)


@pytest.mark.parametrize("name", meshes("data=8", "tensor=8", "expert=8", "context=8", DCT, CET))
def test_it_is_one_devices(name):
    check(name)


@pytest.mark.parametrize("name", meshes("data=8", "expert=8", "data=2,context=2,expert=2"))
def test_fewer_rows_than_shards(name):
    check(name, rows=FEW)


@pytest.mark.parametrize("name", meshes("data=8", "tensor=8", "expert=8", DT))
def test_dense_attention(name):
    check(name, attention="dense")


@pytest.mark.parametrize("name", meshes(CET, DCT))
def test_fp8(name):
    """What is written is rounded, so all but the last bits of what is summed are one device's."""
    check(name, FP8, cache_format="fp8")


# One shape for every step, so that `make test` compiles few programs.


def compiled(records) -> list[str]:
    """Lists the steps among what JAX says that it compiles."""
    names = (match[1] for each in records if (match := re.match(r"Compiling jit\((\w+)\)", each.getMessage())))
    return [name for name in names if name in ("prefill", "decode", "draw_first")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [(CET, ROWS), ("data=4", FEW)])
def test_batch_invariant_rows(name, rows, caplog):
    """`warm` compiles the one program of each step: pools, parameters and what steps hand on stay where they are."""
    mesh = mesh_of(name)
    alone(batch_invariant=True)
    cache = PagedCache(CONFIG, PAGES, format="float32", mesh=mesh)
    runner = Runner(small_model(CONFIG), cache, prefill_chunk=CHUNK, batch_invariant=True, **RETURNED)
    shardings = parameter_shardings(nnx.split(small_model(CONFIG))[1], mesh, copies=True)
    for x, sharding in zip(runner.parameters, jax.tree.leaves(shardings), strict=True):
        assert x.sharding == sharding
        assert x.sharding.is_fully_replicated or name == CET
    with jax.log_compiles():
        runner.warm(rows=[1], tokens=[CHUNK])
        assert set(compiled(caplog.records)) >= {"draw_first", "decode"}  # other tests may have had the same prefill
        caplog.clear()
        check(name, rows=rows, batch_invariant=True)
        assert not compiled(caplog.records)


def test_a_step_gathers_no_parameters():
    """Where rows are split and nothing else, all that travels are logits and what was drawn."""
    mesh = mesh_of("data=4")
    cache = PagedCache(CONFIG, 1, format="float32", mesh=mesh)
    runner = Runner(small_model(CONFIG), cache, prefill_chunk=CHUNK)
    graph, options = nnx.split(small_model(CONFIG))[0], runner.options
    state = jax.tree.unflatten(runner._tree, runner.parameters)
    table, zero = np.zeros((4, 1), np.int32), np.zeros((4, 1), np.int32)
    rows = Rows(zero, zero, zero, zero, zero)
    pools = cache.latents, cache.index_keys
    run = jax.jit(lambda pools, state: _forward_on(graph, options, pools, state, table, rows))
    assert "all-gather" not in run.lower(pools, state).compile(compiler_options=FAST).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True])
def test_a_checkpoint_on_a_mesh_continues_as_on_one_device(tmp_path, copies):
    save_hf(small_model(CONFIG), tmp_path / "hf")
    mesh, want = mesh_of(CET), alone(batch_invariant=True)
    model = load_hf(tmp_path / "hf", dtype="float32", mesh=mesh, copies=copies)
    options = dict(temperature=0, prefill_chunk=CHUNK, batch_invariant=True)
    found = generate(model, PROMPTS, max_new_tokens=NEW, mesh=mesh, **options, **RETURNED)
    same_bits(np.asarray(found)[::2], want.tokens[::2])  # the others are drawn at random


def extended(mesh, model, rows) -> list[np.ndarray]:
    """Appends four tokens to each prompt, then in place of three of them four others; then the first four to forks."""
    cache = PagedCache(CONFIG, PAGES if mesh else 2 * PAGES, format="float32", mesh=mesh)
    runner = Runner(model, cache, prefill_chunk=CHUNK, batch_invariant=True, **RETURNED)
    sequences = [cache.new(row * cache.row_shards // rows) for row in range(rows)]
    runner.prefill(sequences, [np.asarray(prompt) for prompt in PROMPTS[:rows]])
    forks = [cache.fork(sequence) for sequence in sequences]
    drafts = np.random.default_rng(0).integers(64, size=(2, rows, 4))

    def extend(sequences, draft):
        placed = runner.place(sequences)
        at = [placed.index(sequence) for sequence in sequences]
        tokens = np.zeros((len(placed), 4), np.int32)
        tokens[at] = draft
        return np.asarray(runner.extend(placed, tokens))[at]

    results = [extend(sequences, drafts[0])]
    for sequence in sequences:
        cache.truncate(sequence, cache.length(sequence) - 3)
    results.append(extend(sequences, drafts[1]))
    results.append(extend(forks, drafts[0]))
    cache.check()
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [(CET, 4), pytest.param("data=4", FEW, marks=pytest.mark.meshes)])
def test_four_tokens_at_a_time(name, rows):
    """What is forgotten leaves nothing, and what a fork shares stays as it was, whichever shard has the page."""
    want, mesh = extended(None, small_model(CONFIG), rows), mesh_of(name)
    found = extended(mesh, on_mesh(CONFIG, mesh), rows)
    for actual, expected in zip(found, want, strict=True):
        assert actual.shape == (rows, 4, 64)
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    same_bits(found[2], found[0])


# What is refused, before any work.


def refuses(words, call):
    with unchecked(), pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(Runner, "prefill", lambda *_: pytest.fail("a step ran"))
    model, context, data = small_model(CONFIG), mesh_of("context=2"), mesh_of("data=2")
    go = functools.partial(generate, max_new_tokens=1, temperature=0)
    refuses(
        ["attention", "'sparse'", "context=2", "'dense'"], lambda: go(model, [[1]], attention="dense", mesh=context)
    )
    heads = small_model(small_config())
    refuses(["tensor=2 must divide num_attention_heads 3"], lambda: go(heads, [[1]], mesh=mesh_of("tensor=2")))
    refuses(["tensor=2 must divide"], lambda: PagedCache(small_config(), 1, mesh=mesh_of("tensor=2")))
    strange = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    refuses(["must have the axes"], lambda: go(model, [[1]], mesh=strange))
    there = on_mesh(CONFIG, data)
    refuses(
        ["cache", "data=2", "context=2"], lambda: Runner(there, PagedCache(CONFIG, 1, format="float32", mesh=context))
    )
    refuses(["data=2", "got no mesh"], lambda: Runner(there, PagedCache(CONFIG, 1, format="float32")))
    cache = PagedCache(CONFIG, 1, format="float32", mesh=data)
    first, second = cache.new(0), cache.new(1)
    runner = Runner(there, cache)
    refuses(["row 0", "shard 0", "got one of 1"], lambda: runner.extend([second, first], np.zeros((2, 1), int)))
    refuses(["multiple of the 2 shards", "got 1"], lambda: cache.table([first], 1))
    assert cache.length(first) == cache.length(second) == 0
    refuses(["rows", "0 to 1", "got 2"], lambda: cache.new(2))
    for call in (lambda: cache.save(first, "nowhere"), lambda: cache.restore("nowhere")):
        refuses(["on a mesh"], call)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(attention="dense", return_indexer_kl=False), ["never gathered", "'sparse'"]),
        (dict(return_indexer_kl=True), ["never gathered", "no KL"]),
    ],
    ids=str,
)
def test_sharded_keys_are_never_gathered(options, words):
    """Neither dense attention nor a divergence: traced alone, for it must be refused while tracing."""
    cache = PagedCache(CONFIG, 1, format="float32", mesh=mesh_of("context=2"))

    def forward(pools: tuple, table, zero):
        latents, index_keys = pools
        keys = KeyRange(zero, zero + 1)
        pages = Pages.at(latents, index_keys, table, keys, value_dim=CONFIG.kv_lora_rank)
        return small_model(CONFIG)(zero, keys=keys, positions=zero, cache=pages, **options).hidden

    specs = spec(None, "pool"), spec("rows", "pages"), spec("rows")
    local = jax.shard_map(forward, mesh=cache.mesh, in_specs=specs, out_specs=spec("rows"), check_vma=False)
    arrays = (cache.latents, cache.index_keys), np.zeros((1, 2), np.int32), np.zeros((1, 1), np.int32)
    refuses(words, lambda: jax.eval_shape(local, *arrays))
