"""Native Sparse Attention over caches: the entries that they keep, and how little a step computes and reads."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import nsa_reference
import numpy as np
import pytest
from cases import close, equations, normal, same_bits
from engine_cases import prompt, run, tokens_of
from flax import nnx
from model_cases import forward, small_config, small_model, tokens

from dsa_jax import Cache, Config, Engine, KeyRange, NGram, NSASizes, PagedCache, Request, Runner, SamplingParams, paged
from dsa_jax.baselines.nsa import NativeSparseMLA, completed_strides
from dsa_jax.cache import Pages
from dsa_jax.cache_shapes import cache_token_bytes, page_shapes, token_bytes

SIZES = NSASizes(compression=4, stride=2, block=8, blocks=4, window=6)
CONFIG = small_config(baseline="nsa", nsa=SIZES, first_k_dense_replace=2, max_position_embeddings=256)
CHUNK, LONGEST, NEAR = 16, 140, 1e-4
pytestmark = pytest.mark.usefixtures("in_a_hurry")


def text(length, seed=0):
    return np.asarray(tokens(1, length, seed=seed))[0]


def whole(ids):
    """Logits behind every token, by the forward pass of one length, which keeps nothing."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(ids)] = ids
    return forward(CONFIG, jnp.asarray(padded), keys=KeyRange.causal(1, LONGEST))[1][0, : len(ids)]


def near(logits, expected):
    np.testing.assert_allclose(logits, expected, rtol=NEAR, atol=NEAR)


def make(config=CONFIG, format="float32", chunk=CHUNK):
    """A runner over pages that hold NaN, or bytes of it, before they are written."""
    cache = PagedCache(config, 12, format=format)
    cache.update(
        *(jnp.full_like(x, 255 if x.dtype == jnp.uint8 else jnp.nan) for x in (cache.latents, cache.index_keys))
    )
    return Runner(small_model(config), cache, prefill_chunk=chunk, max_length=256)


def begin(runner, *texts):
    sequences = [runner.cache.new() for _ in texts]
    return sequences, runner.prefill(sequences, texts).logits


def go_on(runner, sequences, texts):
    """Appends the next token of each text and a wrong draft, which is taken back; the logits behind the token."""
    lengths = [runner.cache.length(sequence) for sequence in sequences]
    right = np.array([ids[length] for ids, length in zip(texts, lengths, strict=True)])
    found = runner.extend(sequences, np.stack([right, (right + 7) % 64], axis=1))[:, 0]
    for sequence, length, ids, logits in zip(sequences, lengths, texts, found, strict=True):
        runner.cache.truncate(sequence, length + 1)
        near(logits, whole(ids)[length])


def test_entries_are_complete_with_their_last_key():
    rng = np.random.default_rng(0)
    for sizes in (SIZES, NSASizes(), NSASizes(compression=8, stride=8, block=8)):
        positions = rng.integers(-1, 100, (3, 40))
        expected = [
            sorted(
                (
                    (p + 1) // sizes.stride - 1
                    for p in row
                    if (p + 1) % sizes.stride == 0 and p + 1 >= sizes.compression
                ),
                reverse=True,
            )
            for row in positions.tolist()
        ]
        found = completed_strides(jnp.asarray(positions), sizes=sizes)
        np.testing.assert_array_equal(found, [row + [-1] * (40 - len(row)) for row in expected])


@pytest.mark.slow
def test_chunks_and_steps_over_pages_equal_the_whole():
    """Rows of unequal lengths in pages that held NaN, in chunks that end anywhere; every step takes a draft back."""
    texts = [text(72, 1), text(5, 2), text(132, 3)]
    prefixes = [texts[0][:67], texts[1], texts[2][:126]]
    runner = make()
    sequences, logits = begin(runner, *prefixes)
    for row, prefix in enumerate(prefixes):
        near(logits[row], whole(prefix)[-1])
    for _ in range(5):
        go_on(runner, [sequences[0], sequences[2]], [texts[0], texts[2]])
    for number, layer in enumerate(small_model(CONFIG).layers()):
        own, pages = layer.self_attn.compression, np.asarray(runner.cache.pages_of(sequences[2]))
        kv, entries = (
            np.asarray(x[number, pages]).reshape(1, -1, 24) for x in (runner.cache.latents, runner.cache.index_keys)
        )
        expected = nsa_reference.compress(kv[:, :131], own.position[...], own.up_proj[...], own.down_proj[...], SIZES)
        close(entries[:, 1:65], expected, 1e-5)


def test_a_chunk_of_many_sequences_completes_more_entries_than_its_share():
    """Three sequences in one row, which complete nine entries by fifteen tokens: one more than a lone one can."""
    texts = [text(8, seed) for seed in (4, 5, 6)]
    positions = np.concatenate([np.arange(3, 8) + 64 * row for row in range(3)])
    assert np.sum(np.asarray(completed_strides(jnp.asarray(positions)[None], sizes=SIZES)) >= 0) == 9 > CHUNK // 2
    runner = make()
    sequences, _ = begin(runner, *(ids[:3] for ids in texts))
    found = runner.prefill(sequences, [ids[3:] for ids in texts]).logits
    for row, ids in enumerate(texts):
        near(found[row], whole(ids)[-1])


def test_a_shared_page_holds_nothing_of_what_follows():
    """Two go on from one page, whose last entry ends in the next; then two from within a page, side by side."""
    runner, first = make(), text(76, 7)
    second = np.concatenate([first[:64], text(12, 8)])
    [one], _ = begin(runner, first[:70])
    page = runner.cache.pages_of(one)[0]
    before = [np.asarray(x[:, page]) for x in (runner.cache.latents, runner.cache.index_keys)]
    other = runner.cache.begin([page])
    near(runner.prefill([other], [second[64:70]]).logits[0], whole(second[:70])[-1])
    for _ in range(2):
        go_on(runner, [one, other], [first, second])
    for x, own in zip((runner.cache.latents, runner.cache.index_keys), before, strict=True):
        same_bits(np.asarray(x[:, page]), own)
    third = np.concatenate([first[:72], text(4, 9)])
    for _ in range(2):
        fork = runner.cache.fork(one)
        go_on(runner, [fork, one], [third, first])
        go_on(runner, [fork, one], [third, first])
        runner.cache.truncate(one, 72)
    runner.cache.check()


def test_what_is_nan_in_one_sequence_stays_there():
    """Two sequences in one row of a prefill: one whose entries are NaN, and one that does not reach them."""
    runner, ids = make(), text(9, 11)
    [lost], _ = begin(runner, text(8, 10))
    page = runner.cache.pages_of(lost)[0]
    runner.cache.update(runner.cache.latents, runner.cache.index_keys.at[:, page].set(jnp.nan))
    found = runner.prefill([lost, runner.cache.new()], [text(4, 12), ids]).logits
    assert np.all(np.isnan(found[0]))
    near(found[1], whole(ids)[-1])


def test_a_contiguous_cache_keeps_entries_too():
    """In chunks that end anywhere over what was NaN; the last comes after a wrong one, which is taken back."""
    ids = np.stack([text(39, 13), text(39, 14)])
    expected = np.stack([whole(row) for row in ids])
    cache = Cache.empty(CONFIG, 2, 45)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, cache)
    assert cache.k_index.shape == (2, 2, 22, 24) and not cache.k_scale.size
    for first in (0, 13, 26):
        chunk = jnp.asarray(ids[:, first : first + 13])
        for own in ((chunk + 1) % 64, chunk) if first == 26 else (chunk,):
            part, found = forward(CONFIG, own, cache=dataclasses.replace(cache, lengths=jnp.full(2, first, jnp.int32)))
            cache = cast(Cache, part.cache)
        near(found, expected[:, first : first + 13])


@pytest.mark.parametrize("format", ["bfloat16", "fp8"])
def test_entries_have_the_format_of_latents(format):
    """Written by strides of the second layer, through a table, and read back; -1 and what is past the end not."""
    config = small_config(baseline="nsa", nsa=SIZES, index_fp8=format == "fp8")
    pools = [jnp.zeros(x.shape, x.dtype) for x in page_shapes(config, 4, format)]
    assert pools[1].shape == (2, 4, 32, pools[0].shape[-1]) and pools[1].dtype == pools[0].dtype
    entries, strides = normal(0, 2, 3, 24, dtype="bfloat16"), jnp.array([[33, -1, 5], [64, 0, 63]])

    @jax.jit
    def write_and_read(pools):
        pages = Pages(*pools, jnp.array([[2, 0], [1, 3]]), jnp.zeros((2, 3), jnp.int32), 16)
        pages = pages.write_compressed(1, strides, entries)
        own = paged.unpack_latents(paged.pack_latents(entries, 16), 16, jnp.bfloat16) if format == "fp8" else entries
        return own, *(pages.layer(layer).compressed(jnp.bfloat16) for layer in (0, 1))

    own, other, found = (np.asarray(x, np.float32) for x in write_and_read(pools))
    expected = np.zeros((2, 64, 24), np.float32)
    for row, place, entry in ((0, 33, 0), (0, 5, 2), (1, 0, 1), (1, 63, 2)):
        expected[row, place] = own[row, entry]
    same_bits(found, expected)
    assert not np.any(other)


def test_bytes_of_a_token():
    """Published sizes: an entry for each 16 latents, of the same bytes; what has no entries keeps what it had."""
    config = Config.deepseek_v32(baseline="nsa", index_fp8=True)
    assert token_bytes(config, "fp8") == 656 + 656 // 16 == 697
    assert cache_token_bytes(config, "fp8") == 61 * 697
    assert token_bytes(config, "bfloat16") == 1152 + 1152 // 16
    assert token_bytes(CONFIG, "float32") == 96 + 48
    held = PagedCache(CONFIG, 3, format="float32")
    assert held.latents.nbytes + held.index_keys.nbytes == 3 * 64 * cache_token_bytes(CONFIG, "float32")
    with pytest.raises(ValueError, match="^nsa block must divide the 64 tokens of a page, got 128$"):
        PagedCache(Config.tiny(baseline="nsa", nsa=NSASizes(block=128)), 1)


def step_of_a_layer(pages):
    """A decode step of a layer of the published sizes over so many pages, as it is traced."""
    config = Config.tiny(baseline="nsa", num_hidden_layers=1, max_position_embeddings=2**20)
    graph, state = nnx.split(nnx.eval_shape(lambda: NativeSparseMLA(config, rngs=nnx.Rngs(0))))
    shape: Any = jax.ShapeDtypeStruct
    edge, angle = shape((1, 1), jnp.int32), shape((1, 1, config.qk_rope_head_dim // 2), jnp.float32)
    table, x = shape((1, pages), jnp.int32), shape((1, 1, config.hidden_size), jnp.float32)

    def step(state, pools, table, x, angle, keys):
        cache = Pages.at(*pools, table, keys, value_dim=config.kv_lora_rank)
        return nnx.merge(graph, state)(x, (angle, angle), keys, cache=cache).x

    pools = page_shapes(config, 8 * pages, "float32")
    return config, jax.jit(step).trace(state, pools, table, x, angle, KeyRange(edge, edge)), pools


def test_a_step_computes_and_reads_entries_and_what_is_selected():
    """Of 64K and 128K keys: more of them cost the products of their entries alone, and no array has an eighth of all.

    The pools themselves are left out: they are written in place.
    """
    config, small, _ = step_of_a_layer(1024)
    _, large, pools = step_of_a_layer(2048)
    costs = [sum(map(operations, equations(traced.jaxpr.jaxpr))) for traced in (small, large)]
    heads, dim, value_dim = config.num_attention_heads, config.latent_dim, config.kv_lora_rank
    products = 2 * heads * (2 * dim + value_dim)  # of an entry: attention's two, and the scores' one
    assert costs[1] - costs[0] == 1024 * 64 // config.nsa.stride * products
    made = {np.prod(each.aval.shape, dtype=int) for each in equations(large.jaxpr.jaxpr) for each in each.outvars}
    made -= {pool.size for pool in pools}
    assert 2048 * 64 // 16 * dim <= max(made) < 2048 * 64 // 8 * dim


def operations(equation):
    """Multiplications and additions of a product, 0 of all else."""
    if equation.primitive.name != "dot_general":
        return 0
    contracted = equation.params["dimension_numbers"][0][0]
    sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * int(np.prod(sizes)) * equation.outvars[0].aval.size


@pytest.mark.variants
@pytest.mark.parametrize("format", ["bfloat16", "fp8"])
def test_steps_in_every_format_equal_one_chunk(format):
    """As near as bfloat16 is: a prompt in one chunk, and its end token by token."""
    config = small_config(
        baseline="nsa", nsa=SIZES, first_k_dense_replace=2, max_position_embeddings=256, dtype="bfloat16",
        index_fp8=format == "fp8",
    )  # fmt: skip
    runner, ids = make(config, format, chunk=128), text(70, 15)
    expected = begin(runner, ids)[1]
    [one], _ = begin(runner, ids[:60])
    for place in range(60, 70):
        logits = runner.extend([one], ids[None, place : place + 1])[0, 0]
    scale = np.std(np.asarray(expected[0], np.float32))
    np.testing.assert_allclose(logits, expected[0], atol=0.1 * scale)


@pytest.mark.variants
@pytest.mark.parametrize("sizes", [(8, 2, 8), (4, 4, 8), (5, 5, 5), (8, 1, 16), (32, 16, 64)], ids=str)
def test_entries_of_other_sizes(sizes):
    """That share many strides, or none; odd ones; one for each key; longer than the text, or than the cache."""
    compression, stride, block = sizes
    sizes = NSASizes(compression=compression, stride=stride, block=block, blocks=3, window=3)
    config = dataclasses.replace(CONFIG, nsa=sizes)
    ids = jnp.asarray(text(24, 16))[None]
    expected = forward(config, ids, keys=KeyRange.causal(1, 24))[1]
    cache = Cache.empty(config, 1, 24)
    for first in range(0, 24, 6):
        part, found = forward(config, ids[:, first : first + 6], cache=cache)
        cache = cast(Cache, part.cache)
        near(found, expected[:, first : first + 6])


@pytest.mark.slow
def test_an_engine_with_few_pages_drafts_and_samples_in_parallel():
    """Prefixes that are shared, preemptions and drafts that are taken back: tokens are as alone."""
    model = small_model(CONFIG)

    def engine(pages, rows, **options):
        runner = Runner(model, PagedCache(CONFIG, pages, format="float32"), prefill_chunk=32, max_length=256)
        return Engine(runner, rows=rows, **options)

    same = prompt(53, 4)
    params = [SamplingParams(temperature=0.5 * row, seed=row, n=1 + row % 2, max_tokens=80) for row in range(4)]
    asked = [Request([*same, *prompt(3, row)], own) for row, own in enumerate(params)]
    busy = engine(6, 4, drafter=NGram())
    found = run(busy, *asked)
    assert busy.scheduler.preemptions and busy.prefix.hits
    lone = engine(12, 2, reuse_prefixes=False)
    for request, events in zip(asked, found, strict=True):
        [expected] = run(lone, request)
        for index in range(request.params.n):
            assert tokens_of(events, index) == tokens_of(expected, index)
    greedy = tokens_of(found[0])
    assert 0 < busy.stats().drafts_accepted < busy.stats().drafts_proposed
    ids = np.array([*asked[0].prompt, *greedy])
    np.testing.assert_array_equal(np.argmax(whole(ids), -1)[len(asked[0].prompt) - 1 : -1], greedy)
