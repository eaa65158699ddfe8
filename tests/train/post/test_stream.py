"""The stream of a policy's batches: groups, rewards, what is dropped, and where a run goes on."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_cases import POLICY, TOKENS, copy_task, outcome, policy_stage, post_model, tasks
from train_cases import small_params

from train.post.environment import Step
from train.post.episodes import open_store
from train.post.pipeline import make_sampler
from train.post.stream import PolicyStream, make_score
from train.post.text import TurnText
from train.state import abstract_params, init_state
from train.step import make_step

pytestmark = pytest.mark.usefixtures("in_a_hurry")
MODEL = post_model()
GRAPHDEF = abstract_params(MODEL)[0]
TASKS = tuple(tasks().values())
TEXT = TurnText.load(None, vocab_size=256, end_of_turn="\n")


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, small_params(MODEL))


@pytest.fixture
def make_stream(tmp_path, params):
    """Makes streams over one store after the other in the test's folder."""
    stack = contextlib.ExitStack()

    def make(*, settings=POLICY, tasks=TASKS, continues=None, **changes):
        stack.close()
        limits = dict(most_stale=settings.updates_per_rollout - 1, uses=settings.num_iterations)
        store = stack.enter_context(open_store(tmp_path / "episodes", **limits))
        values: dict[str, Any] = dict(
            sampler=make_sampler(GRAPHDEF, TEXT, TOKENS, settings), store=store,
            tasks=tasks, settings=settings, batch_size=8, seq_len=TOKENS, seed=1,
        )  # fmt: skip
        stream = PolicyStream(**values | changes)
        if continues is not None:
            stream.set_state({"updates": continues})
        stream.follow(params)
        return stream

    with stack:
        yield make


class Length:
    """Rewards what differs in every model: how long the first turn is."""

    def __call__(self, episodes):
        return [len(episode.turns[0].tokens) / 10 for episode in episodes]


LONG = copy_task(rewards=((Length(), 1.0),))


def test_a_batch_has_whole_groups_with_advantages_of_mean_zero(make_stream):
    stream = make_stream(tasks=(LONG,))
    batch = next(stream)
    assert batch.tokens.shape == batch.advantages.shape == (8, TOKENS)
    groups = batch.advantages[:, 0].reshape(2, 4)
    np.testing.assert_allclose(groups.mean(axis=1), 0, atol=1e-6)
    assert batch.valid.any(axis=1).all() and not batch.valid[:, 0].any()  # the prompt has two tokens
    assert (batch.old_log_probs[batch.valid] < 0).all()
    assert stream.measures()["reward/copy"] == pytest.approx(batch.valid.sum(axis=1).mean() / 10)


def test_the_training_forward_agrees_with_the_engine(make_stream, params):
    batch = next(make_stream())
    found = make_score(GRAPHDEF, params, POLICY)(batch)
    np.testing.assert_allclose(found[batch.valid], batch.old_log_probs[batch.valid], atol=1e-5)


@pytest.mark.slow
def test_equal_rewards_give_no_gradient_and_are_counted(make_stream, params):
    stream = make_stream(tasks=(copy_task(rewards=((lambda episodes: [0.3] * len(episodes), 1.0),)),))
    batch = next(stream)
    assert not batch.advantages.any() and stream.measures()["equal_groups"] == 1.0
    settings = policy_stage().run_phases()[0]
    state = init_state(params, settings, jax.random.key(0))
    _, metrics = make_step(GRAPHDEF, settings)(state, batch.canonical())
    assert float(metrics["grad_norm_backbone"]) == 0.0 and float(metrics["grad_norm_indexer"]) > 0.0
    assert {"masked_share", "clipped_share", "log_ratio", "policy_loss", "kl"} <= metrics.keys()


@pytest.mark.variants
def test_a_step_in_parts_is_the_same_step(make_stream, params):
    settings = policy_stage().run_phases()[0]
    batch = next(make_stream(tasks=(LONG,))).canonical()
    found = []
    for parts in (1, 2):
        state = init_state(params, settings, jax.random.key(0))
        found.append(make_step(GRAPHDEF, settings, micro_batches=parts)(state, batch)[1])
    for name in ("policy_loss", "kl", "grad_norm_backbone", "log_ratio"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-4, abs=1e-6)
    assert float(found[0]["grad_norm_backbone"]) > 0


class Broken:
    """An environment that raises for every second problem."""

    def __init__(self, number):
        self.number = number

    def reset(self):
        return "x:"

    def step(self, text):
        if self.number % 2:
            raise RuntimeError("out of order")
        return Step("", True)


def test_episodes_whose_environment_raises_are_dropped_and_counted(make_stream, params):
    quick = dataclasses.replace(POLICY, temperature=0.2)
    task = copy_task(make=Broken, rewards=((Length(), 1.0),))
    found = make_stream(tasks=(task,), settings=quick)
    found.sampler = Ending(found.sampler)
    batch = next(found)
    dropped = int(found.measures()["dropped_episodes"])
    assert dropped in (4, 8) or dropped == 0
    assert (~batch.valid.any(axis=1)).sum() == dropped


class Ending:
    """A sampler whose model ends all turns, so that the environments are asked."""

    def __init__(self, sampler):
        self.sampler = sampler

    def update(self, params):
        self.sampler.update(params)

    def sample(self, problems, **options):
        episodes = self.sampler.sample(problems, **options)
        for episode in episodes:
            if episode.problem % 2:
                episode.ended, episode.error = "error", "RuntimeError: out of order"
        return episodes


@pytest.mark.parametrize(
    ("reward", "message"),
    [(lambda episodes: [1.0], "must return"), (lambda episodes: [float("nan")] * len(episodes), "must return finite")],
    ids=["count", "nan"],
)
def test_rewards_that_cannot_be_are_refused_by_name(make_stream, reward, message):
    reward.__name__ = "mine"
    stream = make_stream(tasks=(copy_task(rewards=((reward, 1.0),)),))
    with pytest.raises(ValueError, match=f"mine {message}"):
        next(stream)
    assert stream.store.counts.added == 0


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_a_rollout_with_the_same_episodes(make_stream, params):
    settings = dataclasses.replace(POLICY, steps_per_generation=2, num_iterations=2)
    stream = make_stream(settings=settings, tasks=(LONG,))
    batches = [next(stream) for _ in range(4)]
    assert stream.measures() == {"staleness": 3.0}
    rows = lambda batch: {row.tobytes() for row in batch.tokens}
    assert rows(batches[0]) | rows(batches[1]) == rows(batches[2]) | rows(batches[3])  # each twice, one an iteration
    again = make_stream(settings=settings, tasks=(LONG,), continues=2)
    for batch in batches[2:]:
        again.follow(jax.tree.map(lambda x: 2 * x, params))  # other weights, which sample nothing here
        found = next(again)
        for name in ("tokens", "old_log_probs", "advantages"):
            np.testing.assert_array_equal(getattr(found, name), getattr(batch, name))


def test_rollouts_of_weights_that_are_lost_are_sampled_anew(make_stream, params):
    stream = make_stream()
    for _ in range(3):
        stream.follow(params)
        next(stream)
    again = make_stream(continues=1)
    assert again.store.counts.unmade == 8 and again.store.counts.waiting == 8
    assert next(again).valid.any()
    begun = make_stream()  # of a run that was killed before it saved its first weights
    assert begun.store.counts.waiting == 8 and next(begun).valid.any()


def test_teachers_give_advantages_by_token(make_stream, params):
    teacher = make_score(GRAPHDEF, jax.tree.map(lambda x: 1.5 * x, params), POLICY)
    batch = next(make_stream(tasks=(copy_task(),), teachers={"copy": teacher}))
    expected = teacher(batch) - batch.old_log_probs
    np.testing.assert_allclose(batch.advantages, np.where(batch.valid, expected, 0), atol=1e-6)
    assert batch.advantages.std() > 0


def test_a_reference_scores_the_rows(make_stream, params):
    settings = dataclasses.replace(POLICY, beta=0.1)
    batch = next(make_stream(settings=settings, reference=make_score(GRAPHDEF, params, settings)))
    np.testing.assert_allclose(batch.ref_log_probs[batch.valid], batch.old_log_probs[batch.valid], atol=1e-5)
    assert outcome([]) == []
