"""The load test on CPU: what it asks for, when it asks, and what it makes of the answers."""

import argparse
import dataclasses
import functools

import jax
import pytest
from flax import nnx
from model_cases import small_config, small_model

from benchmarks import decode_step, serving
from benchmarks.serving import Answer, Arrival, Traffic
from dsa_jax import Config, Engine, PagedCache, Request, Runner, SamplingParams, Transformer, save_hf

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(first_k_dense_replace=2, max_position_embeddings=256)
TRAFFIC = Traffic(8.0, 10.0, prefixes=2, prefix_tokens=64, own_tokens=10, answer_tokens=4)


def make_engine() -> Engine:
    cache = PagedCache(CONFIG, 16, format="float32")
    return Engine(Runner(small_model(CONFIG), cache, prefill_chunk=64, max_length=256, dense_below=0), rows=2)


def test_arrivals_are_the_same_every_time_and_share_prefixes():
    found = list(serving.arrivals(TRAFFIC, 64, 256))
    assert found == list(serving.arrivals(TRAFFIC, 64, 256))
    times = [arrival.at for arrival in found]
    assert times == sorted(times) and 0 < times[0] and times[-1] < 10 and 50 < len(times) < 110
    prompts = [arrival.request.prompt for arrival in found]
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 2 and len(set(map(tuple, prompts))) == len(prompts)
    lengths, answers = (
        sorted(map(len, prompts)), sorted(arrival.request.params.max_tokens or 0 for arrival in found),
    )  # fmt: skip
    assert abs(lengths[len(found) // 2] - 74) < 4 and abs(answers[len(found) // 2] - 4) <= 1
    assert lengths[0] < lengths[-1] and answers[0] < answers[-1]
    for arrival in serving.arrivals(dataclasses.replace(TRAFFIC, own_tokens=400, answer_tokens=400), 64, 256):
        assert len(arrival.request.prompt) + (arrival.request.params.max_tokens or 0) <= 256


class Clock:
    """Goes on by a second whenever it is asked, and by what is slept."""

    def __init__(self):
        self.now, self.slept = -1.0, []

    def __call__(self):
        self.now += 1
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def send(requests, end):
    clock = Clock()
    return serving.send(make_engine(), requests, end, clock=clock, sleep=clock.sleep), clock.slept


def test_requests_are_sent_when_they_are_due_and_given_up_in_the_end():
    """The third comes long after the others were answered; the fourth takes longer than there is."""
    params = SamplingParams(temperature=0.0, max_tokens=3)
    requests = [Arrival(at, Request([1, 2, 3], params)) for at in (0.5, 1.0, 50.0)]
    answers, slept = send(requests, 1000.0)
    assert [answer.finished for answer in answers] == ["length"] * 3
    assert [answer.asked for answer in answers] == [0.5, 1.0, 50.0]
    assert all(len(answer.tokens) == 3 and answer.tokens == sorted(answer.tokens) for answer in answers)
    assert len(slept) == 1 and 10 < slept[0] < 50 and 50 < answers[2].tokens[0] < 60
    long = Arrival(0.5, Request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=100)))
    [answer], _ = send([long], 20.0)
    assert answer.finished == "cancelled" and 2 < len(answer.tokens) < 20


def test_a_summary_of_answers():
    """Four tokens at gaps of 0.1 s count as 30 ms too slow; one answer is late, one is cut short, one never comes."""
    traffic = Traffic(1.0, first_token_limit=1.0, between_tokens_limit=0.07)
    answers = [
        Answer(1.0, [1.5, 1.55, 1.6], "length"),
        Answer(1.0, [1.2, 1.3, 1.4, 1.5], "length"),
        Answer(1.0, [3.0, 3.05], "length"),
        Answer(2.0, [2.5, 4.0], "cancelled"),
        Answer(3.0, [], "cancelled"),
    ]
    found = serving.summary(answers, traffic)
    assert found["requests"] == 5 and found["answered"] == 3 and found["took_seconds"] == 4.0
    assert found["tokens_per_second"] == pytest.approx(11 / 4)
    assert found["good_per_second"] == pytest.approx(0.25) and found["good_share"] == pytest.approx(0.2)
    assert found["first_token_ms"]["median"] == pytest.approx(500) and 1900 < found["first_token_ms"]["p99"] < 2000
    assert found["between_tokens_ms"]["median"] == pytest.approx(100) and found["between_tokens_ms"]["p99"] > 1400
    assert found["dollars_per_million_tokens"] == pytest.approx(2 / 3600 / 2.75 * 1e6)
    assert serving.summary([], traffic)["first_token_ms"] is None


@pytest.mark.slow
def test_an_engine_runs_the_model_of_a_folder(tmp_path):
    config = Config.tiny(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, max_position_embeddings=256)
    model = Transformer(config, rngs=nnx.Rngs(0))
    save_hf(model, tmp_path / "study")
    arguments = argparse.Namespace(
        tiny=False, model=tmp_path / "study", max_length=16384, batch=[1, 2], chunk=64, drafts=False, mesh=None
    )
    engine = serving.make_engine(arguments)
    assert engine.runner.config == dataclasses.replace(config, index_fp8=True, dtype="bfloat16")
    assert engine.runner.max_length == 256 and engine.cache.free_pages == 2 * 2 * 4
    found = jax.tree.leaves(nnx.split(model)[1])
    assert all(bool((a == b).all()) for a, b in zip(engine.runner.parameters, found, strict=True))


@pytest.mark.slow
def test_a_load_and_the_steps_of_a_full_batch_are_timed(monkeypatch):
    """Nothing of one case is left in the engine for the next; the clock is the test's, so both cases run alike."""
    for module in (serving, decode_step):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(serving, "WINDOWS", 2)
    engine = make_engine()
    step = serving.step_row(engine, 2, 70)
    assert step["batch"] == 2 and step["loss_percent"] == pytest.approx(100 * (1 - step["floor_ms"] / step["step_ms"]))
    assert step["tokens_per_second"] == pytest.approx(2e3 / step["step_ms"])
    traffic = dataclasses.replace(TRAFFIC, rate=200.0, seconds=0.05, patience=600.0)
    rows, timed = [], serving.send
    for _ in range(2):
        clock = Clock()
        monkeypatch.setattr(serving, "send", functools.partial(timed, clock=clock, sleep=clock.sleep))
        rows.append(serving.load_row(engine, traffic))
    assert rows[0]["answered"] == rows[0]["requests"] == len(list(serving.arrivals(traffic, 64, 256))) > 3
    assert 0 < rows[0]["prefix_hits"] == rows[1]["prefix_hits"] and 0 < rows[0]["hit_rate"] < 1
    assert rows[0]["prompt_tokens"] == rows[1]["prompt_tokens"] and rows[1]["programs_compiled"] == 0
    engine.prefix.clear()
    engine.check()
    assert engine.cache.free_pages == 16
