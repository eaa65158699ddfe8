"""A real server over a real engine: clients that come together, leave, read slowly, or come when it stops."""

import asyncio
import contextlib
import functools
import json
import signal
import socket
import threading
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import small_config, small_model
from serving_cases import VOCAB, ScriptedEngine, make_service, make_tokenizer, running

from dsa_jax import PagedCache, Runner
from dsa_jax.inference.engine import Engine
from dsa_jax.inference.params import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(vocab_size=VOCAB, first_k_dense_replace=2, max_position_embeddings=256)
PAGES = 4
BROKEN = VOCAB - 1  # the token whose embedding is NaN
SECONDS = 60  # after which a test gives up


def make_model():
    graph, state = nnx.split(small_model(CONFIG))
    spoil = lambda path, x: x.at[BROKEN].set(jnp.nan) if "embed_tokens" in jax.tree_util.keystr(path) else x
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(spoil, state))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server, and its service."""
    cache = PagedCache(CONFIG, PAGES, format="float32")
    runner = Runner(make_model(), cache, prefill_chunk=32, max_length=256, dense_below=0)
    engine = Engine(runner, rows=4, tokenizer=make_tokenizer())
    service = make_service(engine, tmp_path_factory.mktemp("folder"), max_sequences=400)
    with running(service) as (address, _):
        yield address, service
    engine.check()
    engine.prefix.clear()
    assert engine.cache.free_pages == PAGES and not engine.cache.sequences


def prompt(length, seed=0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def body(length=20, seed=0, **settings):
    return {
        "prompt": prompt(length, seed),
        "temperature": 1.0,
        "top_k": 10,
        "seed": seed,
        "max_tokens": 8,
        "logit_bias": {BROKEN: -100},
    } | settings


def complete(address, **options):
    response = httpx.post(f"{address}/v1/completions", json=body(**options), timeout=SECONDS)
    assert response.status_code == 200, response.text
    return response.json()


def wait_for(condition):
    """Waits until something is so, which it must be in the end."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_idle(service):
    stats = service.engine.stats()
    return not (service.sequences or stats.queued or stats.running) and stats.pages_used == stats.pages_kept


def test_answers_are_the_engines(served):
    """The engine by itself, before anything is asked, and the same by HTTP."""
    address, service = served
    engine = service.engine
    params = SamplingParams(
        temperature=0.0, max_tokens=8, logprobs=2, prompt_logprobs=2, logit_bias={BROKEN: -100}
    )  # fmt: skip
    engine.add(Request(prompt(40), params))
    tokens = []
    while engine.busy:
        tokens += engine.step()
    choice = complete(address, length=40, temperature=0, echo=True, logprobs=2)["choices"][0]
    tokenizer = engine.tokenizer
    text = tokenizer.decode(prompt(40)) + "".join(token.text for token in tokens)
    assert choice["text"] == text and choice["finish_reason"] == "length"
    expected = [each.log_prob for each in tokens[0].prompt] + [token.model_log_prob for token in tokens]
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is expected[0] is None and found[1:] == pytest.approx(expected[1:], abs=1e-5)
    for token, tops in zip(found[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert token in tops.values() and 2 <= len(tops) <= 3


def gather(address, bodies, leaving=()):
    """Sends requests together; of those that leave, streams, the client goes after some events. Returns the texts."""

    async def one(client, place, sent):
        if place not in leaving:
            response = await client.post("/v1/completions", json=sent)
            return response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
        async with client.stream("POST", "/v1/completions", json=sent | {"stream": True}) as response:
            text, count = "", 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text, count = text + json.loads(line[6:])["choices"][0]["text"], count + 1
                if count >= leaving[place]:
                    break
            return text

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=4 * SECONDS, limits=limits) as client:
            return await asyncio.gather(*(one(client, place, sent) for place, sent in enumerate(bodies)))

    return asyncio.run(all_of_them())


@pytest.mark.slow
@pytest.mark.parametrize("count", [14, pytest.param(200, marks=pytest.mark.slow)])
def test_many_clients_of_whom_a_third_vanishes(served, count):
    """On pages for a quarter of them; whoever stays has what it would have alone, and nothing is left behind."""
    address, service = served
    rng = np.random.default_rng(count)
    bodies = [
        body(int(rng.integers(1, 120)), seed=int(rng.integers(9)), max_tokens=int(rng.integers(1, 40)))
        for _ in range(count)
    ]  # fmt: skip
    needed = sum(-(-(len(each["prompt"]) + each["max_tokens"] - 1) // 64) for each in bodies)
    assert needed > 4 * PAGES
    leaving = {place: int(rng.integers(1, 6)) for place in rng.choice(count, count * 3 // 10, replace=False).tolist()}
    texts = gather(address, bodies, leaving)
    wait_for(lambda: is_idle(service))
    alone = functools.cache(lambda sent: gather(address, [json.loads(sent)])[0])
    for place, (sent, text) in enumerate(zip(bodies, texts, strict=True)):
        expected = alone(json.dumps(sent))
        assert text == expected or place in leaving and expected.startswith(text), place
    assert is_idle(service) and service.failed is None


@contextlib.contextmanager
def paused(engine):
    """A time in which no step begins."""
    engine.pause()
    try:
        yield
    finally:
        engine.resume()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_leaves_frees_its_pages(served, stream, half):
    """It leaves while the engine is paused, and then no token of it is generated, whether it closes one way or both."""
    address, service = served
    engine = service.engine
    host, port = address.removeprefix("http://").split(":")
    data = json.dumps(body(30, max_tokens=200, stream=stream, temperature=0)).encode()
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        wait_for(lambda: engine.stats().running == 1)
        with paused(engine):
            before = engine.stats().generated_tokens
            connection.shutdown(socket.SHUT_WR) if half else connection.close()
            wait_for(lambda: service.sequences == 0)
        wait_for(lambda: is_idle(service))
    assert engine.stats().generated_tokens - before <= 2, "what was under way, and no more"


def test_a_nan_ends_its_request_alone(served):
    address, service = served
    bad = body(seed=1) | {"prompt": [*prompt(20, 1), BROKEN]}
    alone = complete(address, seed=2)["choices"][0]["text"]
    texts = gather(address, [body(seed=2), bad, body(seed=2)])
    assert texts[0] == texts[2] == alone
    error = json.loads(texts[1])["error"]
    assert error["type"] == "server_error" and "NaN" in error["message"]
    response = httpx.post(f"{address}/v1/completions", json=bad | {"stream": True}, timeout=SECONDS)
    assert response.status_code == 500 and "NaN" in response.text
    assert httpx.get(f"{address}/health").status_code == 200


def test_the_engines_refusals_are_400(served):
    address, _ = served
    bad = [dict(structured_outputs={"regex": "("}), dict(structured_outputs={"json": "{"}), dict(logit_bias={999: 1})]
    for more in bad:
        response = httpx.post(f"{address}/v1/completions", json=body(**more), timeout=SECONDS)
        assert response.status_code == 400 and response.json()["error"]["message"], response.text


def test_metrics_follow_the_engine(served):
    address, service = served
    complete(address)
    wait_for(lambda: is_idle(service))
    values = dict(line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if line[0] != "#")
    assert float(values["dsa_jax_generated_tokens_total"]) == service.engine.stats().generated_tokens > 0
    assert float(values["dsa_jax_pages"]) == PAGES and float(values["dsa_jax_running"]) == 0


# A scripted engine: what happens in time is the test's choice.


@pytest.fixture
def scripted(tmp_path):
    return functools.partial(make_service, folder=tmp_path)


def test_a_client_that_does_not_read_is_left(scripted):
    """Nothing is held for it but what the system's buffers take, and what it asked for."""
    engine = ScriptedEngine("hello " * 4000)
    engine.max_length, engine.cache.pages = 30_000, 1000
    service = scripted(engine, send_seconds=0.2)
    data = json.dumps({"prompt": "he", "stream": True, "max_tokens": 25_000, "logprobs": 20}).encode()
    with running(service, send_buffer=4096) as (address, _):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with connection:
            connection.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(data) + data
            )
            wait_for(lambda: engine.requests)
            wait_for(lambda: service.sequences == 0)
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_large_prompt_does_not_stop_the_others(scripted):
    """Health is asked again and again while its tokens are made."""
    service = scripted(ScriptedEngine(), max_body=2**22)

    async def both(address):
        async with httpx.AsyncClient(base_url=address, timeout=SECONDS) as client:
            large = asyncio.create_task(client.post("/v1/completions", json={"prompt": "the quick brown " * 2**16}))
            count = 0
            while not large.done():
                assert (await client.get("/health")).status_code == 200
                count += 1
            return count, await large

    with running(service) as (address, _):
        count, response = asyncio.run(both(address))
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert count > 3


def start(address, **more):
    """Sends a request from a thread; returns a function that waits for its response."""
    out = []
    send = lambda: out.append(httpx.post(f"{address}/v1/completions", json={"prompt": "he"} | more, timeout=SECONDS))
    thread = threading.Thread(target=send)
    thread.start()

    def joined():
        thread.join(SECONDS)
        return out[0]

    return joined


def test_draining_lets_requests_end_and_no_further_one_in(scripted):
    engine = ScriptedEngine()
    engine.hold.clear()
    with running(scripted(engine)) as (address, server):
        first = start(address)
        wait_for(lambda: engine.requests)
        server.handle_exit(signal.SIGTERM, None)
        refused = start(address)()
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx.get(f"{address}/health/ready").status_code == 503
        assert httpx.get(f"{address}/health/live").status_code == 200
        engine.hold.set()
        assert first().json()["choices"][0]["text"] == "hello"
        wait_for(lambda: not server.started or server.servers and not server.servers[0].is_serving())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_requests_that_do_not_end_in_time_are_told(scripted, stream, again):
    """The time is over, or a second signal comes."""
    engine = ScriptedEngine()
    engine.hold.clear()
    service = scripted(engine, drain_seconds=1000.0 if again else 0.05)
    with running(service) as (address, server):
        first = start(address, stream=stream)
        wait_for(lambda: engine.requests)
        for _ in range(1 + again):
            server.handle_exit(signal.SIGTERM, None)
        response = first()
        assert response.status_code == 503 and response.json()["error"]["code"] == "draining"
    assert engine.cancelled == 1 and service.sequences == 0
