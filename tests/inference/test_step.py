"""The steps over pages against the plain forward pass: chunks, prefixes, batches, and what may not change a bit."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import same_bits, the_first, unchecked
from flax import nnx
from model_cases import forward, small_config, small_model, tokens

from dsa_jax import KeyRange, OutOfPages, PagedCache, Runner, complete, stream
from dsa_jax.inference.generate import _Stream
from dsa_jax.inference.programs import padding_settings

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(max_position_embeddings=256, first_k_dense_replace=2)  # without experts compiled sooner
EXPERTS = small_config(max_position_embeddings=256)
FP8 = small_config(max_position_embeddings=256, index_fp8=True)
ROUTED = small_config(max_position_embeddings=256, first_k_dense_replace=1)
NEAR = 1e-5
CHUNKED: dict[str, Any] = dict(prefill_chunk=50, max_length=256, return_selected=True)  # three tests share its programs
LENGTHS = (70, 5, 131)  # below K, across a page, across two


def prompts(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    return [np.asarray(tokens(1, length, seed=length))[0] for length in lengths]


def make(config=CONFIG, pages=16, cache_format="float32", **options) -> Runner:
    return Runner(small_model(config), PagedCache(config, pages, format=cache_format), **options)


def prefilled(runner: Runner, lengths=LENGTHS):
    sequences = [runner.cache.new() for _ in lengths]
    return sequences, runner.prefill(sequences, prompts(lengths))


@functools.cache
def whole(config, length):
    """Logits behind every token of one prompt, and its selections, by the plain forward pass of a fixed length."""
    ids = np.zeros((1, max(LENGTHS)), np.int32)
    ids[0, :length] = prompts([length])[0]
    out, logits = forward(config, jnp.asarray(ids), keys=KeyRange.causal(*ids.shape))
    return np.asarray(logits[0, :length]), np.asarray(out.selected[:, 0, :length])


# Prefill


@pytest.mark.parametrize("chunk", the_first(1, [50, 16, 4096]))
def test_prefill_in_chunks_equals_the_forward_pass(chunk):
    """Ragged prompts, packed in rows of `chunk` tokens."""
    sequences, found = prefilled(make(EXPERTS, **CHUNKED | dict(prefill_chunk=chunk)))
    assert found.selected is not None
    for row, length in enumerate(LENGTHS):
        logits, selected = whole(EXPERTS, length)
        np.testing.assert_allclose(found.logits[row], logits[-1], atol=NEAR)
        width = min(selected.shape[-1], EXPERTS.index_topk)
        np.testing.assert_array_equal(found.selected[row][..., :width], selected[..., :width])
        assert np.all(found.selected[row][..., width:] == -1)
    assert len(sequences) == len(set(sequences))


def test_short_prompts_attend_densely_and_agree_across_the_border():
    """Below K the multi-head form runs over the same keys; the index keys that it writes serve what comes later."""
    config = small_config(max_position_embeddings=256, first_k_dense_replace=2, index_topk=80)
    results = {}
    for below in (0, 80):
        runner = make(config, dense_below=below)
        sequences, first = prefilled(runner, (70, 5))
        more = runner.prefill(sequences, prompts((40, 100)))  # beyond K, over the keys of before
        results[below] = np.asarray(first.logits), np.asarray(more.logits)
    for sparse, dense in zip(results[0], results[80], strict=True):
        np.testing.assert_allclose(dense, sparse, atol=NEAR)
    assert np.any(results[0][0] != results[80][0]), "both took the same form"


def test_a_prefix_is_shared_by_a_fork():
    """Both branches go on as the whole prompt does, whichever writes first, though the prefix ends within a page."""
    runner = make(EXPERTS, **CHUNKED)
    ids = prompts([131])[0]
    first = runner.cache.new()
    runner.prefill([first], [ids[:70]])
    second = runner.cache.fork(first)
    runner.prefill([second], [np.flip(ids[:30])])
    found = runner.prefill([first], [ids[70:]])
    np.testing.assert_allclose(found.logits[0], whole(EXPERTS, 131)[0][-1], atol=NEAR)
    runner.cache.check()


# Decode


@pytest.mark.parametrize("count", the_first(1, [3, 1, 2, 4]))
def test_tokens_appended_together_equal_the_forward_pass(count):
    """One to four tokens a row, with a row of padding between; then they are taken back and appended again."""
    runner = make(EXPERTS, **CHUNKED)
    sequences = [runner.cache.new() for _ in range(2)]
    ids = prompts([131, 70])
    runner.prefill(sequences, [ids[0][:-count], ids[1][:-count]])
    rows = [sequences[0], None, sequences[1]]
    taken = np.stack([ids[0][-count:], np.zeros(count, int), ids[1][-count:]])
    for _ in range(2):
        logits = np.asarray(runner.extend(rows, taken))
        for row, length in ((0, 131), (2, 70)):
            np.testing.assert_allclose(logits[row], whole(EXPERTS, length)[0][-count:], atol=NEAR)
        for sequence in sequences:
            runner.cache.truncate(sequence, runner.cache.length(sequence) - count)


@pytest.mark.slow
def test_completions_know_what_led_to_them():
    config, ids = ROUTED, prompts()
    done = complete(
        small_model(config), [list(map(int, row)) for row in ids], max_new_tokens=5, temperature=0.0,
        return_selected=True, return_routed=True, return_kept=True,
    )  # fmt: skip
    assert done.finished == ["length"] * 3 and done.lengths.tolist() == [5] * 3
    assert done.selected and done.routed and done.kept
    lengths = [len(row) + 4 for row in ids]
    together = np.zeros((3, max(lengths)), np.int32)
    selected = np.full((config.num_hidden_layers, 3, max(lengths), config.index_topk), -1, np.int32)
    routed = np.zeros((config.num_moe_layers, 3, max(lengths), config.num_experts_per_tok), np.int32)
    for row, length in enumerate(lengths):
        together[row, :length] = np.concatenate([ids[row], done.tokens[row, :-1]])
        assert done.selected[row].shape == (config.num_hidden_layers, length, config.index_topk)
        assert done.routed[row].shape == (config.num_moe_layers, length, config.num_experts_per_tok)
        selected[:, row, :length], routed[:, row, :length] = done.selected[row], done.routed[row]
    keys = KeyRange.lengths(jnp.asarray(lengths), max(lengths))
    out, logits = forward(config, jnp.asarray(together), keys=keys)
    np.testing.assert_array_equal(selected, out.selected)
    replayed = dict(selected=jnp.asarray(selected), routed=jnp.asarray(routed))
    _, again = forward(config, jnp.asarray(together), keys=keys, **replayed)
    for row, length in enumerate(lengths):
        log_probs = np.asarray(jax.nn.log_softmax(logits[row, len(ids[row]) - 1 : length]))
        np.testing.assert_array_equal(np.argmax(log_probs, -1), done.tokens[row])
        np.testing.assert_allclose(log_probs.max(-1), done.log_probs[row], atol=NEAR)
        assert [len(kept) for kept in done.kept[row]] == [config.vocab_size] * 5
        np.testing.assert_allclose(again[row, :length], logits[row, :length], atol=NEAR)


@pytest.mark.slow
def test_a_draw_depends_on_its_row_alone():
    lengths = 70, 66, 75  # alone these take one program
    model, ids = small_model(CONFIG), [list(map(int, row)) for row in prompts(lengths)]
    settings = dict(max_new_tokens=4, temperature=[1.0, 0.7, 1.3], top_p=[1.0, 0.8, 0.9], top_k=[64, 64, 7])
    together = complete(model, ids, seed=[5, 6, 7], return_kept=True, **settings)
    assert together.kept is not None
    for row in range(3):
        own = {name: value if name == "max_new_tokens" else value[row] for name, value in settings.items()}
        alone = complete(model, ids[row : row + 1], seed=5 + row, return_kept=True, **own)
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=NEAR)
        for token, kept in zip(together.tokens[row], together.kept[row], strict=True):
            assert token in kept and (len(kept) <= 7 if row == 2 else len(kept) <= 64)
    other = complete(model, ids, seed=[8, 9, 10], return_kept=True, **settings)
    assert np.any(other.tokens != together.tokens)


# What may not change a bit


@pytest.mark.parametrize(
    ("config", "cache_format"),
    the_first(1, [(FP8, "fp8"), (CONFIG, "float32"), (ROUTED, "float32")]),
    ids=["fp8", "float32", "experts"],
)
def test_batch_invariant_logits_are_the_same_bits(config, cache_format):
    """Alone and in a batch, cold and after a prefix of any length, in any pages."""

    def run(lengths, cut=0, spoil=0):
        runner = make(config, 32, cache_format, batch_invariant=True, prefill_chunk=64)
        for _ in range(spoil):  # other pages
            runner.cache.extend(runner.cache.new(), 64)
        sequences = [runner.cache.new() for _ in lengths]
        ids = prompts(lengths)
        if cut:
            runner.prefill(sequences, [row[:cut] for row in ids])
        first = runner.prefill(sequences, [row[cut:] for row in ids])
        for sequence in sequences:
            runner.cache.extend(sequence, 3)
        rows = runner.place(sequences)
        order = [0 if row is None else sequences.index(row) for row in rows]
        settings = padding_settings(len(rows), config.vocab_size)
        length = np.array([0 if row is None else lengths[i] for i, row in zip(order, rows, strict=True)], np.int32)
        live = np.array([row is not None for row in rows])
        stops = np.full(1, -1, np.int32)
        carry, _ = runner.first(first.logits[np.array(order)], length, settings, stops, live)
        logits = [np.asarray(first.logits)]
        for _ in range(3):
            carry, _, out = runner.decode(carry, runner.table(rows), settings, stops)
            logits.append(np.asarray(out.logits[: len(lengths), 0]))
        return np.stack(logits)

    together = run(LENGTHS)
    alone = run(LENGTHS[2:])
    same_bits(alone[:, 0], together[:, 2])
    for cut in (1, 63, 64, 100):
        same_bits(run(LENGTHS[2:], cut=cut, spoil=cut % 3), alone)


def test_batch_invariant_draws_are_of_one_kind():
    """A greedy row beside others runs the program that it runs alone: its log-probabilities keep their bits."""
    alone = [
        _Stream(small_model(CONFIG), [[1]], max_new_tokens=1, seed=1, batch_invariant=True, **each).kind
        for each in (dict(temperature=0.0), dict(temperature=1.0), dict(top_k=3))
    ]
    assert len(set(alone)) == 1


def decode_arguments(runner, sequences, length):
    """The arguments of a decode step of sequences of one length, greedy, and the stop tokens among them."""
    rows = runner.place(sequences)
    live = np.array([row is not None for row in rows])
    settings, stops = padding_settings(len(rows), runner.config.vocab_size), np.full(1, -1, np.int32)
    logits = jnp.zeros((len(rows), runner.config.vocab_size))
    carry, _ = runner.first(logits, np.where(live, length, 0).astype(np.int32), settings, stops, live)
    pools = runner.cache.latents, runner.cache.index_keys
    return (pools, carry, runner.parameters, runner.table(rows), settings, stops), stops


def test_pools_are_donated():
    """A step gives the pools back in the memory that they came in."""
    runner = make()
    sequence = runner.cache.new()
    runner.prefill([sequence], prompts([20]))
    before = runner.cache.latents
    arguments, stops = decode_arguments(runner, [sequence], 20)
    memory = runner.programs.decode.lower(*arguments, "greedy").compile().memory_analysis()
    assert memory.alias_size_in_bytes >= runner.cache.latents.nbytes + runner.cache.index_keys.nbytes
    runner.decode(arguments[1], arguments[3], arguments[4], stops, kind="greedy")
    assert before.is_deleted()


def test_steps_are_compiled_ahead_of_time():
    runner = make(max_length=256)
    runner.warm(rows=[1], tokens=[16], kinds=["greedy"])
    sizes = [run._cache_size() for run in (*runner.programs, *runner.dense_programs)]
    prefilled(runner, (3, 4, 5))  # however many end in a step
    sequences, found = prefilled(runner, (12,))
    rows = runner.place(sequences)
    settings, stops = padding_settings(1, CONFIG.vocab_size), np.full(1, -1, np.int32)
    runner.cache.extend(sequences[0], 100)
    carry, _ = runner.first(found.logits, np.full(1, 12, np.int32), settings, stops, np.ones(1, bool))
    runner.decode(carry, runner.table(rows), settings, stops, kind="greedy")
    assert [run._cache_size() for run in (*runner.programs, *runner.dense_programs)] == sizes


# Ends and errors


class Letters:
    """Decodes every token as a letter."""

    def decode(self, ids):
        return "".join(chr(ord("A") + token) for token in ids)


def test_stop_strings_end_a_row():
    model, ids = small_model(CONFIG), [list(map(int, row)) for row in prompts()]
    free = complete(model, ids, max_new_tokens=6, temperature=0.0)
    text = Letters().decode(free.tokens[1].tolist())
    stopped = complete(model, ids, max_new_tokens=6, temperature=0.0, stop_strings=text[1:3], tokenizer=Letters())
    assert stopped.finished[1] == "stop" and stopped.lengths[1] == text.index(text[1:3]) + 2
    assert np.array_equal(stopped.tokens[1][: stopped.lengths[1]], free.tokens[1][: stopped.lengths[1]])
    assert np.all(stopped.tokens[1][stopped.lengths[1] :] == stopped.tokens[1][stopped.lengths[1] - 1])


def test_a_stream_yields_what_complete_returns():
    model, ids = small_model(CONFIG), [list(map(int, row)) for row in prompts()]
    steps = list(stream(model, ids, max_new_tokens=4, temperature=0.0))
    done = complete(model, ids, max_new_tokens=4, temperature=0.0)
    assert np.array_equal(np.stack([each.tokens for each in steps], 1), done.tokens) and len(steps) == 4


def test_rows_of_nan_end_and_the_others_go_on(caplog):
    model = small_model(CONFIG)
    graph, state = nnx.split(model)
    spoil = lambda path, x: x.at[63].set(jnp.nan) if "embed_tokens" in jax.tree_util.keystr(path) else x
    broken = nnx.merge(graph, jax.tree_util.tree_map_with_path(spoil, state))
    ids = [list(map(int, row[row != 63])) for row in prompts()]
    with caplog.at_level(logging.WARNING):
        done = complete(broken, [ids[0], [*ids[1], 63], ids[2]], max_new_tokens=3, temperature=0.0)
    whole = complete(model, ids, max_new_tokens=3, temperature=0.0)
    assert done.finished[1] == "nan" and done.lengths[1] == 0 and "row 1" in caplog.text
    for row in (0, 2):
        assert np.array_equal(done.tokens[row], whole.tokens[row]) and done.finished[row] == "length"


def test_too_few_pages_change_nothing():
    runner = make(pages=2)
    sequences = [runner.cache.new() for _ in range(3)]
    with pytest.raises(OutOfPages, match="needs 3 more pages, got 0 free of 2"):
        runner.prefill(sequences, prompts((64, 64, 131)))
    assert runner.cache.free_pages == 2 and [runner.cache.length(each) for each in sequences] == [0, 0, 0]
    runner.cache.check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(prefill_chunk=0), ["prefill_chunk", "0"]),
        (dict(dense_below=99), ["dense_below", "index_topk", "99"]),
        (dict(max_length=257), ["max_length", "256", "257"]),
        (dict(cache_of=FP8), ["model's config"]),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, words):
    cache = PagedCache(options.get("cache_of", CONFIG), 2, format="float32")
    options = {name: value for name, value in options.items() if name != "cache_of"}
    with unchecked(), pytest.raises(ValueError) as caught:
        Runner(small_model(CONFIG), cache, **options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([[1, 2], []], {}, ["row 1", "at least one"]),
        ([[1, 2], [3, 64]], {}, ["64", "row 1"]),
        ([[1], [2] * 255], {}, ["256", "row 1"]),
        ([[1], [2]], dict(temperature=[0.5, -1.0], seed=1), ["row 1", "-1"]),
        ([[1], [2]], dict(temperature=[0.5]), ["temperature", "2 rows"]),
        ([[1]], dict(stop_strings="x"), ["stop_strings", "tokenizer"]),
        ([[1]], dict(seed=1, key=0), ["seed"]),
        ([[1]], dict(cache_format="int8"), ["format", "int8"]),
        ([[1]], dict(cache_format="fp8"), ["fp8", "index_fp8"]),
        ("text", {}, ["tokens", "integers"]),
    ],
    ids=str,
)
def test_bad_requests_name_the_row(tokens, options, words):
    with unchecked(), pytest.raises(ValueError) as caught:
        complete(small_model(CONFIG), tokens, **dict(max_new_tokens=3, temperature=0.0) | options)
    assert all(word in str(caught.value) for word in words), caught.value
