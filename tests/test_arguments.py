"""Arguments that are not what they should be are refused in one readable line, and what is meant is taken."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, normal, same_bits, unchecked
from model_cases import small_config, small_model, tokens

import dsa_jax
from dsa_jax import KeyRange, index_scores, model, select_keys, select_topk, sparse_attention

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config()
IDS = tokens(1, 24)  # one shape, so that the tests of eager calls share their programs


def attend(scale):
    q, kv, indices = array(np.ones((1, 1, 1, 4))), array(np.ones((1, 2, 4))), array(np.zeros((1, 1, 1), np.int32))
    return sparse_attention(q, kv, indices, value_dim=2, scale=scale)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jax.jit(attend)(0.5), ["scale", "known when traced", "static"]),
        (lambda: attend("a"), ["scale", "number", "str"]),
        (lambda: attend(float("nan")), ["scale", "finite", "nan"]),
        (lambda: select_topk(jnp.zeros((1, 1, 4)), 8.0), ["k must be an int", "float"]),
        (lambda: select_topk(jnp.zeros((1, 1, 4)), True), ["k must be an int", "bool"]),
        (lambda: jax.jit(lambda k: select_topk(jnp.zeros((1, 1, 4)), k))(2), ["k must be an int", "known when traced"]),
        (lambda: select_topk(jnp.zeros((1, 1, 4)), jnp.int32(2)), ["k must be an int"]),
        (lambda: index_scores(*index(), jnp.ones((1, 3, 5), bool)), ["KeyRange", "causal", "[1, 3, 5]"]),
        (lambda: select_keys(*index(), None, k=2), ["KeyRange", "NoneType"]),
        (lambda: KeyRange.packed(jnp.zeros(3, jnp.int32)), ["segment_ids", "[B, T]", "[3]"]),
        (lambda: KeyRange.packed(jnp.zeros((1, 3))), ["segment_ids", "integers", "float32"]),
        (lambda: small_model(CONFIG)("some text"), ["tokens", "integers [B, T]", "<U9"]),
        (lambda: small_model(CONFIG)([[1, 2], [3]]), ["tokens", "different lengths"]),
        (lambda: small_model(CONFIG)([1, 2]), ["tokens", "(2,)"]),
        (lambda: small_model(CONFIG)([[0.5]]), ["tokens", "float64"]),
        (lambda: small_model(CONFIG)(tokens(1, 4), keys=jnp.ones((1, 4, 4), bool)), ["KeyRange", "[1, 4, 4]"]),
    ],
)
def test_it_is_refused_in_a_line(call, words):
    with unchecked(), pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words) and len(message) < 1000 and "\n" not in message, message


def index():
    return normal(0, 1, 3, 2, 4), normal(1, 1, 5, 4), normal(2, 1, 3, 2)


def test_numbers_of_numpy_are_numbers():
    same_bits(attend(np.float32(0.5))[0], attend(0.5)[0])
    same_bits(select_topk(normal(0, 1, 2, 5), np.int64(2)), select_topk(normal(0, 1, 2, 5), 2))


def test_lists_of_lists_are_tokens():
    with unchecked():
        same_bits(small_model(CONFIG)(np.asarray(IDS).tolist()).hidden, small_model(CONFIG)(IDS).hidden)


# The model outside `jit`


def test_an_eager_call_is_compiled_once_a_shape():
    first = small_model(CONFIG)(IDS)
    before = model._run_compiled._cache_size()
    again = small_model(CONFIG)(tokens(*IDS.shape, seed=3))
    assert model._run_compiled._cache_size() == before
    assert not np.array_equal(first.hidden, again.hidden)
    assert model._run_compiled._cache_size() == before


def test_an_eager_call_gives_what_a_jitted_one_gives():
    eager = small_model(CONFIG)(IDS, return_selected=True)
    jitted = jax.jit(lambda ids: small_model(CONFIG)(ids, return_selected=True))(IDS)
    np.testing.assert_allclose(eager.hidden, jitted.hidden, rtol=1e-5, atol=1e-6)
    same_bits(eager.selected, jitted.selected)


# What is not asked for is not computed; what is, is there


def flops(**options):
    ids = tokens(1, 32)
    run = jax.jit(lambda ids: small_model(CONFIG)(ids, **options))
    return run.lower(ids).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_without_the_kl_nothing_of_it_is_computed(attention):
    ids = tokens(1, 32)
    with_kl = small_model(CONFIG)(ids, attention=attention)
    without = small_model(CONFIG)(ids, attention=attention, return_indexer_kl=False)
    assert without.indexer_kl is None and with_kl.indexer_kl.shape == (CONFIG.num_hidden_layers, 1, 32)
    np.testing.assert_allclose(without.hidden, with_kl.hidden, rtol=1e-5, atol=1e-6)
    assert flops(attention=attention, return_indexer_kl=False) < 0.97 * flops(attention=attention)


def test_dense_attention_says_what_the_indexer_would_select():
    """In the first layer, whose input is the same, that is what sparse attention selects."""
    dense = small_model(CONFIG)(IDS, attention="dense", return_selected=True)
    sparse = small_model(CONFIG)(IDS, return_selected=True)
    same_bits(np.asarray(dense.selected)[0], np.asarray(sparse.selected)[0])
    assert jax.eval_shape(lambda ids: small_model(CONFIG)(ids, attention="dense"), IDS).selected is None


def test_a_selection_is_no_wider_than_the_sequence():
    short = np.asarray(small_model(CONFIG)(tokens(1, 3), return_selected=True).selected)
    assert short.shape[-1] == 3 < CONFIG.index_topk
    assert np.array_equal(short[0, 0], [[0, -1, -1], [0, 1, -1], [0, 1, 2]])


def test_modules_show_their_arguments():
    for module, name in ((dsa_jax.Transformer, "config"), (dsa_jax.SparseMLA, "config"), (dsa_jax.MoE, "config")):
        assert next(iter(inspect.signature(module).parameters)) == name


def test_forward_mode_is_refused_in_words():
    q, kv, indices = jnp.ones((1, 4, 2, 12)), jnp.ones((1, 4, 12)), jnp.zeros((1, 4, 2), jnp.int32)
    attend = lambda q: sparse_attention(q, kv, indices, value_dim=8, scale=1.0)[0]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(attend, (q,), (q,))
