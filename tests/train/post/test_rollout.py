"""Rollouts: episodes of many turns, whatever their environments do, against the forward pass of training."""

import dataclasses
import functools
import logging
import math

import jax
import numpy as np
import pytest
from cases import same_bits, the_first
from model_cases import small_config, small_model
from rollout_cases import (
    ALL,
    CONFIG,
    LENGTH,
    SETTINGS,
    Letters,
    batch_of,
    graphdef_and_params,
    hangs,
    make,
    raises,
    talk_task,
    tokens_of,
)
from sharded_cases import mesh_of

from dsa_jax.inference.turns import Turns
from dsa_jax.parallel.sharding import place_batch
from train.losses import log_probabilities
from train.optimizer import OptimizerSettings
from train.phases import SPARSE, merge_groups, run_model, split_groups
from train.post.environment import Step
from train.post.recorded import Recorded, Recording, replay_rows
from train.post.rollout import MAX_KEPT, Rollouts, count_ended, rollout
from train.settings import PhaseSettings, Stage
from train.state import init_state, place_state
from train.step import make_step

pytestmark = pytest.mark.usefixtures("in_a_hurry")

PROBLEMS = [(talk_task(), 3), (talk_task("short", max_turns=1), 8)]


@functools.cache
def recorded():
    """Six episodes on four rows: two wait for others to end."""
    return tuple(make().sample(PROBLEMS, **SETTINGS))


@functools.partial(jax.jit, static_argnums=(0, 3))
def trained_log_probs(graphdef, params, batch, temperature=0.9):
    model = merge_groups(graphdef, params)
    return log_probabilities(model, run_model(model, batch, attention="sparse"), batch, temperature=temperature)


def test_episodes_are_groups_of_turns():
    episodes = recorded()
    assert [(each.task, each.problem) for each in episodes] == [("talk", 3)] * 3 + [("short", 8)] * 3
    assert len({tokens_of(each).tobytes() for each in episodes}) == 6, "members of a group draw differently"
    for each in episodes:
        written = sum(len(turn.tokens) for turn in each.turns)
        behind = len(tokens_of(each)) - len(each.prompt_tokens)
        assert 0 < behind <= 48 and written <= behind
        assert each.ended in ("done", "turns", "tokens") and not each.error
        assert [turn.text for turn in each.turns if turn.tokens[-1] == 0] == each.environment.heard
        assert not len(each.turns[-1].observation_tokens) and not each.turns[-1].observation
        for turn in each.turns[:-1]:
            assert turn.tokens[-1] == 0 and 0 not in turn.tokens[:-1]
            assert Letters().encode(turn.observation).tolist() == turn.observation_tokens.tolist()
        assert all(len(turn.tokens) == len(turn.log_probs) for turn in each.turns)
    assert max(len(each.turns) for each in episodes) > 1, "one turn shows nothing of answers"


@pytest.mark.parametrize("replay", [("kept",), ("kept", "routes", "selections")])
def test_log_probabilities_are_those_of_the_training_forward(replay):
    batch, old = batch_of(recorded(), replay=replay)
    apart = np.abs(np.asarray(trained_log_probs(*graphdef_and_params(), batch)) - old)[np.asarray(batch.valid)]
    assert apart.max() <= 1e-5 and apart.mean() <= 2e-6 and len(apart) > 100


def test_without_the_kept_sets_they_are_not():
    batch, old = batch_of(recorded())
    apart = np.abs(np.asarray(trained_log_probs(*graphdef_and_params(), batch)) - old)[np.asarray(batch.valid)]
    assert apart.mean() > 1e-3


def test_the_training_forward_selects_and_routes_the_same():
    batch, _ = batch_of(recorded(), replay=("routes", "selections"))
    model = small_model(CONFIG)
    out = model(batch.tokens, keys=batch.keys, positions=batch.positions, return_selected=True, return_routed=True)
    for row, each in enumerate(recorded()):
        n = len(tokens_of(each)) - 1
        assert each.recorded.selections.shape == (n, 2, 8) and each.recorded.selections.dtype == np.int16
        assert each.recorded.routes.shape == (n, 2, 2) and each.recorded.routes.dtype == np.uint8
        same_bits(each.recorded.selections.swapaxes(0, 1).astype(np.int32), np.asarray(out.selected)[:, row, :n])
        mine, theirs = np.sort(each.recorded.routes, -1), np.sort(np.asarray(out.routed)[:, row, :n], -1)
        same_bits(mine.swapaxes(0, 1).astype(np.int32), theirs)


def test_what_is_replayed_decides():
    """Other experts and other keys make other log-probabilities, of what a batch replays alone."""
    batch, _ = batch_of(recorded(), replay=("routes", "selections", "kept"))
    base = trained_log_probs(*graphdef_and_params(), batch)
    valid = np.asarray(batch.valid)
    for name, change in (
        ("routes", lambda x: np.where(x < 0, x, (x + 1) % 8)),
        ("selections", lambda x: np.where(np.arange(x.shape[-1]) < 1, x, -1)),
    ):
        replay = dataclasses.replace(batch.replay, **{name: change(getattr(batch.replay, name))})
        other = dataclasses.replace(batch, replay=replay)
        assert np.abs(np.asarray(trained_log_probs(*graphdef_and_params(), other) - base))[valid].max() > 1e-2


def test_kept_sets_hold_their_tokens():
    for each in recorded():
        at = len(each.prompt_tokens)
        assert all(len(each.recorded.kept(position)) == 0 for position in range(at))
        for turn in each.turns:
            for token in turn.tokens:
                assert token in each.recorded.kept(at) and len(each.recorded.kept(at)) < 16
                at += 1
            at += len(turn.observation_tokens)


@pytest.mark.variants
def test_nothing_is_recorded_unless_asked_for():
    assert all(each.recorded is None for each in make(record=Recording()).sample(PROBLEMS[:1], **SETTINGS))
    only = make(record=Recording(routes=True)).sample(PROBLEMS[:1], **SETTINGS)
    assert all(each.recorded.selections is None and each.recorded.kept_ids is None for each in only)
    assert all(each.recorded.routes is not None for each in only)


@pytest.mark.slow
@pytest.mark.parametrize("rows", the_first(1, [1, 3]))
def test_an_episode_is_the_same_whatever_is_played_beside_it(rows):
    own = rollout(make(rows=rows), PROBLEMS, **SETTINGS)
    assert [tokens_of(each).tolist() for each in own] == [tokens_of(each).tolist() for each in recorded()]


def test_another_seed_draws_other_episodes():
    other = make().sample(PROBLEMS, **SETTINGS | {"seed": 6})
    assert tokens_of(other[0]).tolist() != tokens_of(recorded()[0]).tolist()


def test_a_groups_prompt_is_read_once(monkeypatch):
    read, before = [], Turns.read

    def counted(self, rows, tokens):
        read.append(sum(len(tokens[place]) for place, row in enumerate(rows) if row is not None))
        return before(self, rows, tokens)

    monkeypatch.setattr(Turns, "read", counted)
    rollouts = make()
    episodes = rollouts.sample([(talk_task(max_turns=1, args=(1, 70)), 1)], **SETTINGS | {"num_generations": 4})
    assert read == [71] and [len(each.prompt_tokens) for each in episodes] == [71] * 4
    assert rollouts.runner.cache.free_pages == rollouts.runner.cache.pages


BAD = {
    "make": talk_task("make", make=raises),
    "reset": talk_task("reset", reset=raises),
    "no text": talk_task("no text", reset=lambda own: 5),
    "step": talk_task("step", step=raises),
    "exits": talk_task("exits", step=lambda own, text: exit(3)),
    "no step": talk_task("no step", step=lambda own, text: "abc"),
    "no answer": talk_task("no answer", step=lambda own, text: Step(None, False)),  # type: ignore[arg-type]
    "long": talk_task("long", args=(1, LENGTH + 4)),
    "empty": talk_task("empty", reset=lambda own: ""),
}


def test_bad_environments_end_their_own_episodes_alone(caplog):
    problems = [(task, 0) for task in BAD.values()]
    mixed = [PROBLEMS[0], *problems, PROBLEMS[1]]
    rollouts = make()
    with caplog.at_level(logging.WARNING):
        episodes = rollouts.sample(mixed, **SETTINGS | {"num_generations": 1})
    by_task = {each.task: each for each in episodes}
    assert len(episodes) == len(mixed) and {by_task["talk"].ended, by_task["short"].ended} <= {
        "done",
        "turns",
        "tokens",
    }
    for name, error in {
        "make": "RuntimeError: the world has ended",
        "reset": "RuntimeError: the world has ended",
        "no text": "TypeError: prompt must be a text, got 5",
    }.items():
        assert (by_task[name].ended, by_task[name].error, by_task[name].turns) == ("error", error, [])
    for name, error in {
        "step": "RuntimeError: the world has ended",
        "exits": "SystemExit: 3",
        "no step": "TypeError: step must return Step(observation: str, done: bool), got 'abc'",
        "no answer": "TypeError: step must return Step",
    }.items():
        assert by_task[name].ended == "error" and by_task[name].error.startswith(error)
    assert by_task["long"].ended == by_task["empty"].ended == "full"
    assert by_task["long"].error == (
        "the prompt of problem 0 of task long must be from 1 to 95 tokens to fit seq_len 96, got 100"
    )
    assert by_task["long"].error in caplog.text and "the run goes on without it" in caplog.text
    assert count_ended(episodes)["full"] == 2
    assert rollouts.runner.cache.free_pages == rollouts.runner.cache.pages, "whoever ends gives its pages back"
    rollouts.runner.cache.check()


def test_an_environment_that_hangs_is_left_behind():
    """The others' episodes are those that they are without it."""
    problems = [(talk_task("hangs", step=hangs), 3), (talk_task("stuck", reset=hangs), 0), PROBLEMS[0]]
    episodes = make().sample(problems, **SETTINGS | {"num_generations": 1}, episode_seconds=2.0)
    assert [each.ended for each in episodes[:2]] == ["seconds"] * 2
    assert "did not answer in time" in episodes[1].error and not episodes[1].turns


def test_an_endless_environment_is_ended_by_a_limit():
    endless = talk_task("endless", max_turns=10**6, args=(10**6,))
    by_tokens = make().sample([(endless, 0)], **SETTINGS)
    assert {each.ended for each in by_tokens} == {"tokens"}
    assert all(len(tokens_of(each)) - len(each.prompt_tokens) <= 48 for each in by_tokens)
    by_context = make().sample([(endless, 0)], **SETTINGS | {"max_completion_length": 500})
    assert {each.ended for each in by_context} == {"full"}
    assert all(len(tokens_of(each)) <= LENGTH for each in by_context)
    by_turns = make().sample([(talk_task("two", max_turns=2, args=(10**6,)), 0)], **SETTINGS)
    assert "turns" in {each.ended for each in by_turns} <= {"turns", "tokens"}
    assert max(len(each.turns) for each in by_turns) == 2


def test_nan_weights_end_episodes_and_leave_no_token():
    graphdef, params = split_groups(small_model(CONFIG))
    backbone = jax.tree.map(lambda x: np.full_like(x, np.nan), params["backbone"])
    episodes = make(params={**params, "backbone": backbone}).sample(PROBLEMS[:1], **SETTINGS)
    assert {(each.ended, each.error) for each in episodes} == {("error", "the model's logits are NaN")}
    assert all(not each.turns and each.recorded is None for each in episodes)


def test_ids_that_the_model_lacks_are_no_tokens():
    rollouts = make()
    rollouts.text = type("Wide", (Letters,), {"encode": lambda self, text: np.array([3, 16], np.int32)})()
    [episode] = rollouts.sample(PROBLEMS[:1], **SETTINGS | {"num_generations": 1})
    assert (episode.ended, episode.error) == ("error", "ValueError: prompt must have tokens in [0, 16), got 3 … 16")


def test_an_interrupted_play_leaves_an_empty_cache(monkeypatch):
    rollouts = make()
    with monkeypatch.context() as patch:
        patch.setattr(Turns, "draw", raises)
        with pytest.raises(RuntimeError, match="the world has ended"):
            rollouts.sample(PROBLEMS, **SETTINGS)
    assert rollouts.runner.cache.free_pages == rollouts.runner.cache.pages and not rollouts.runner.cache.sequences
    assert rollouts.sample(PROBLEMS[:1], **SETTINGS)


def test_weights_are_used_where_they_lie():
    _, params = graphdef_and_params()
    rollouts = make()
    pointers = lambda tree: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
    assert pointers(rollouts.runner.parameters) == pointers(params)
    other = jax.tree.map(lambda x: x * 1.1, params)
    rollouts.update(other)
    assert pointers(rollouts.runner.parameters) == pointers(other)
    before = make().sample(PROBLEMS[:1], **SETTINGS)
    after = rollouts.sample(PROBLEMS[:1], **SETTINGS)
    assert [tokens_of(x).tolist() for x in before] != [tokens_of(x).tolist() for x in after]


def test_weights_that_a_step_has_taken_over_are_refused():
    params = jax.tree.map(lambda x: x + 0, graphdef_and_params()[1])
    rollouts = make(params=params)
    jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)(params)
    with pytest.raises(ValueError, match=r"taken over the weights of the rollouts: call update\(params\) again"):
        rollouts.sample(PROBLEMS, **SETTINGS)
    rollouts.update(graphdef_and_params()[1])
    assert rollouts.sample(PROBLEMS[:1], **SETTINGS)


@pytest.mark.slow
def test_rollouts_and_steps_take_turns_on_one_mesh():
    """The same episodes as on one device, before and after a training step on the same mesh, from the same arrays."""
    mesh = mesh_of("data=2,tensor=2")
    graphdef, params = split_groups(small_model(CONFIG))
    adamw = OptimizerSettings(1e-3)
    settings = PhaseSettings(SPARSE, (Stage(2, 4, LENGTH),), backbone=adamw, indexer=adamw)
    found = []
    for own in (None, mesh):
        # Of a mesh of two shards of rows, half of the rows each.
        rollouts = Rollouts(graphdef, Letters(), LENGTH, rows=4 if own is None else 2, mesh=own, record=ALL,
            cache_format="float32")  # fmt: skip
        state = init_state(jax.tree.map(lambda x: x + 0, params), settings, jax.random.PRNGKey(0))
        state = state if own is None else place_state(state, own)
        step = make_step(graphdef, settings, mesh=own, micro_batches=2 if own is None else 1)
        sampled = []
        for number in range(2):
            rollouts.update(state.params)
            episodes = rollouts.sample(PROBLEMS, **SETTINGS | {"seed": number})
            sampled += episodes
            batch = batch_of(episodes[:4], replay=("routes", "selections"))[0]
            state, metrics = step(state, batch if own is None else place_batch(batch, own))
        found.append((sampled, float(metrics["loss"])))
    (alone, loss), (spread, spread_loss) = found
    assert [tokens_of(each).tolist() for each in spread] == [tokens_of(each).tolist() for each in alone]
    assert spread_loss == pytest.approx(loss, rel=1e-4)
    for mine, theirs in zip(spread[:6], alone[:6], strict=True):  # later ones are of weights that differ in last bits
        same_bits(mine.recorded.selections, theirs.recorded.selections)
        same_bits(np.sort(mine.recorded.routes, -1), np.sort(theirs.recorded.routes, -1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(top_p=0.0), "top_p must be a finite number above 0"),
        (dict(top_p=1.5), "top_p must be at most 1, got 1.5"),
        (dict(temperature=-1.0), "temperature must be a finite number at least 0"),
        (dict(num_generations=0), "num_generations must be at least 1, got 0"),
        (dict(max_completion_length=0), "max_completion_length must be at least 1"),
        (dict(episode_seconds=0.0), "episode_seconds must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        make().sample(PROBLEMS, **SETTINGS | change)


def test_rollouts_that_cannot_be_are_refused():
    graphdef, params = graphdef_and_params()
    with pytest.raises(ValueError, match=r"call update\(params\) first"):
        Rollouts(graphdef, Letters(), LENGTH).sample(PROBLEMS, **SETTINGS)
    with pytest.raises(ValueError, match="seq_len must be at most max_position_embeddings = 128, got 129"):
        Rollouts(graphdef, Letters(), 129).update(params)
    with pytest.raises(ValueError, match="dense attention selects nothing"):
        Rollouts(graphdef, Letters(), 64, "dense", record=ALL).update(params)


def test_top_p_alone_keeps_a_bounded_set():
    config = small_config(vocab_size=2 * MAX_KEPT, first_k_dense_replace=2, max_position_embeddings=128)
    rollouts = make(config=config, params=split_groups(small_model(config))[1], record=Recording(kept=True))
    settings = dict(num_generations=1, temperature=50.0, top_p=0.99, max_completion_length=4)
    [episode] = rollouts.sample([(talk_task(max_turns=1), 0)], **SETTINGS | settings)
    sizes = np.diff(episode.recorded.kept_offsets)[len(episode.prompt_tokens) :]
    assert sizes.tolist() == [MAX_KEPT] * len(sizes) and math.isfinite(episode.turns[0].log_probs.sum())


def test_rows_of_replay():
    episodes = recorded()
    arrays = replay_rows(episodes, LENGTH)
    assert arrays["routes"].shape == (6, LENGTH, 2, 2) and arrays["selections"].shape == (6, LENGTH, 2, 8)
    for row, each in enumerate(episodes):
        n = len(tokens_of(each))
        same_bits(arrays["routes"][row, : n - 1], each.recorded.routes.astype(np.int16))
        assert (arrays["routes"][row, n - 1 :] == -1).all() and (arrays["selections"][row, n - 1 :] == -1).all()
        for place in range(n - 1):
            ids = arrays["kept"][row, place]
            assert ids[ids >= 0].tolist() == each.recorded.kept(place + 1).tolist()
        assert (arrays["kept"][row, n - 1 :] == -1).all()
    with pytest.raises(ValueError, match="kept sets must be at most 1 ids to be replayed, got one of"):
        replay_rows(episodes, LENGTH, kept_width=1)
    other = dataclasses.replace(episodes[0], recorded=Recorded())
    with pytest.raises(ValueError, match="routes must be recorded of all .* none for problem 3 of task talk"):
        replay_rows([*episodes, other], LENGTH)
