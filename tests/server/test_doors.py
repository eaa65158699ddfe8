"""Who is let in and what with: hosts, origins, keys, content types, sizes, counts, draining."""

import asyncio
import logging

import pytest
from serving_cases import ScriptedEngine, client_of, make_service

from dsa_jax.server import Settings, read_keys
from dsa_jax.server.admission import Admission, Keys
from dsa_jax.server.app import make_app

KEY, OTHER_KEY = "sk-one-long-secret", "sk-another-secret"
COMPLETION = {"prompt": "he"}
JSON = {"content-type": "application/json"}


@pytest.fixture
def service(tmp_path):
    return make_service(ScriptedEngine(), tmp_path)


def send(service, method, path, **options):
    async def sent():
        async with client_of(service) as client:
            return await client.request(method, path, **options)

    return asyncio.run(sent())


def error_of(response):
    """The error of a response, whose shape must be OpenAI's."""
    data = response.json()
    assert data.keys() == {"error"} and data["error"].keys() == {"message", "type", "param", "code"}
    assert len(data["error"]["message"]) < 1000 and "\n" not in data["error"]["message"]
    return data["error"]


# Hosts and origins


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "10.0.0.7", "gpu.lan:80"])
def test_own_hosts_are_answered(tmp_path, host):
    service = make_service(ScriptedEngine(), tmp_path, hosts=("gpu.lan",))
    assert send(service, "GET", "/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:8000", "", "[::1", "a@localhost@b"]
)
def test_other_hosts_are_refused(service, host):
    """A page whose name was made to mean this machine comes with its own."""
    response = send(service, "POST", "/v1/completions", json=COMPLETION, headers={"host": host})
    assert response.status_code == 403 and error_of(response)["code"] == "host"
    assert not service.engine.requests


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://localhost.evil.example"]
)
def test_other_origins_are_refused(service, origin):
    response = send(service, "POST", "/v1/completions", json=COMPLETION, headers={"origin": origin})
    assert response.status_code == 403 and error_of(response)["code"] == "origin"
    assert not service.engine.requests


def test_the_own_origin_is_answered_without_cors(service):
    response = send(service, "POST", "/v1/completions", json=COMPLETION, headers={"origin": "http://localhost"})
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers
    asked = {"origin": "http://localhost", "access-control-request-method": "POST"}
    assert send(service, "OPTIONS", "/v1/completions", headers=asked).status_code == 405


def test_an_origin_that_is_named_gets_cors_on_answers_and_errors(tmp_path):
    origin = "https://chat.example.org"
    service = make_service(ScriptedEngine(), tmp_path, origins=(origin,), keys=(KEY,))
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    preflight = send(service, "OPTIONS", "/v1/completions", headers=asked)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == origin
    refused = send(service, "POST", "/v1/completions", json=COMPLETION, headers={"origin": origin})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
    other = asked | {"origin": "https://evil.example"}
    assert send(service, "OPTIONS", "/v1/completions", headers=other).status_code == 403


# Keys


def test_every_endpoint_but_health_and_the_page_needs_a_key(tmp_path):
    service = make_service(ScriptedEngine(), tmp_path, keys=(KEY, OTHER_KEY))
    app, _ = make_app(service)
    closed = ["/metrics", "/v1/models", "/v1/models/tiny", "/tokenizer_info", "/openapi.json", "/nothing"]
    posted = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
    for method, path in [*(("GET", each) for each in closed), *(("POST", each) for each in posted)]:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            response = send(service, method, path, headers=headers, json={} if method == "POST" else None)
            assert response.status_code == 401, path
            assert error_of(response)["type"] == "authentication_error"
    for path in ("/", "/page/chat.js", "/health", "/health/live", "/health/ready"):
        assert send(service, "GET", path).status_code == 200
    for key in (KEY, OTHER_KEY):
        response = send(service, "POST", "/v1/completions", json=COMPLETION, headers={"authorization": f"Bearer {key}"})
        assert response.status_code == 200


def test_all_keys_are_compared(monkeypatch):
    """By codes of one length, in constant time: the place of the key in the file does not show."""
    import hmac

    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda left, right: compared.append(len(left)) or compare(left, right))
    keys = Keys((KEY, OTHER_KEY, "third"))
    assert keys.identify({"authorization": f"Bearer {KEY}"}) and compared == [64] * 3


def test_prefixes_are_shared_within_a_key_and_a_salt_alone(tmp_path):
    service = make_service(ScriptedEngine(), tmp_path, keys=(KEY, OTHER_KEY))
    asked = [(KEY, {}), (KEY, {}), (KEY, {"cache_salt": "a"}), (OTHER_KEY, {}), (OTHER_KEY, {"cache_salt": "a"})]
    for key, more in asked:
        send(service, "POST", "/v1/completions", json=COMPLETION | more, headers={"authorization": f"Bearer {key}"})
    salts = [request.salt for request in service.engine.requests]
    assert salts[0] == salts[1] and len(set(salts)) == 4
    assert not any(secret in "".join(salts) for secret in (KEY, OTHER_KEY))
    assert Keys((KEY,)).identify({"authorization": f"Bearer {KEY}"}) != service.keys.identify(
        {"authorization": f"Bearer {KEY}"}
    ), "another process has another secret"


def test_key_files_are_read_and_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n\n  {OTHER_KEY}\n")
    path.chmod(0o600)
    assert read_keys(path) == (KEY, OTHER_KEY)
    for text, words in (("", "got none"), ("two words\n", "line 1"), ("a\nb\x07\n", "line 2"), ("é\n", "ASCII")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_keys(path)
    path.write_text(KEY)
    for mode in (0o640, 0o604, 0o622):
        path.chmod(mode)
        with pytest.raises(ValueError, match=f"chmod 600.*{mode:04o}") as caught:
            read_keys(path)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu.lan"])
def test_an_address_that_others_reach_needs_keys(host):
    with pytest.raises(ValueError, match="loopback"):
        Settings("tiny", host)
    assert Settings("tiny", host, keys=(KEY,)).host == host


def test_loopback_needs_none():
    assert {Settings("tiny", host).host for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(port=-1), "port must be from 0 to 65535, got -1"),
        (dict(max_body=0), "max_body must be positive"),
        (dict(origins=("*",)), "origins"),
        (dict(origins=("https://a/b",)), "origins"),
        (dict(drain_seconds=-1), "drain_seconds"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Settings("tiny", **options)


# Bodies


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx"],
)
def test_bodies_that_are_no_json_are_refused(service, kind):
    """A page of another site can send these without asking first."""
    headers = {"content-type": kind} if kind else {}
    for path in ("/v1/completions", "/tokenize"):
        response = send(service, "POST", path, content=b'{"prompt": "he"}', headers=headers)
        assert response.status_code == 415 and error_of(response)["code"] == "content_type"
    assert not service.engine.requests


def test_json_with_a_charset_is_json(service):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert send(service, "POST", "/v1/completions", content=b'{"prompt": "he"}', headers=headers).status_code == 200


def test_compressed_bodies_are_refused(service):
    headers = JSON | {"content-encoding": "gzip"}
    assert send(service, "POST", "/v1/completions", content=b"{}", headers=headers).status_code == 415


@pytest.mark.parametrize("size", [101, 399, 401, 5000])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused_by_what_comes(tmp_path, size, chunked):
    """Of a body in pieces no length is known before."""
    service = make_service(ScriptedEngine(), tmp_path, max_body=100)

    async def pieces():
        for _ in range(size):
            yield b" "

    response = send(service, "POST", "/v1/completions", content=pieces() if chunked else b" " * size, headers=JSON)
    assert response.status_code == 413 and "at most 100 bytes" in error_of(response)["message"]
    fits = b'{"prompt": "he"}'.ljust(100)
    assert send(service, "POST", "/v1/completions", content=fits, headers=JSON).status_code == 200


def test_a_body_that_does_not_come_is_given_up(tmp_path):
    service = make_service(ScriptedEngine(), tmp_path, body_seconds=0.05)

    async def pieces():
        yield b"{"
        await asyncio.sleep(5)

    response = send(service, "POST", "/v1/completions", content=pieces(), headers=JSON)
    assert response.status_code == 408 and error_of(response)["code"] == "timeout"


# Counts


def test_requests_beyond_the_limit_may_try_again(tmp_path):
    """The places are free again when the others have their answers."""
    service = make_service(ScriptedEngine(), tmp_path, max_requests=2)
    service.engine.hold.clear()

    async def many():
        async with client_of(service) as client:
            post = lambda: client.post("/v1/completions", json=COMPLETION)
            first = [asyncio.create_task(post()) for _ in range(2)]
            while len(service.engine.requests) < 2:
                await asyncio.sleep(0)
            refused = await post()
            fine = await client.get("/health")
            service.engine.hold.set()
            return refused, fine, [await each for each in first], await post()

    refused, fine, first, later = asyncio.run(many())
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert error_of(refused)["type"] == "rate_limit_error"
    assert fine.status_code == 200 and [each.status_code for each in first] == [200, 200] and later.status_code == 200


def test_continuations_beyond_the_limit_may_try_again(tmp_path):
    service = make_service(ScriptedEngine(), tmp_path, max_sequences=6)
    service.engine.hold.clear()

    async def many():
        async with client_of(service) as client:
            post = lambda n: client.post("/v1/completions", json=COMPLETION | {"n": n})
            first = asyncio.create_task(post(4))
            while not service.engine.requests:
                await asyncio.sleep(0)
            refused, never = await post(3), await post(7)
            service.engine.hold.set()
            return refused, never, await first, await post(6)

    refused, never, first, later = asyncio.run(many())
    assert refused.status_code == 429 and "room for 2 of the 3" in error_of(refused)["message"]
    assert never.status_code == 400 and "at most 6, got 7" in error_of(never)["message"]
    assert first.status_code == later.status_code == 200 and service.sequences == 0


def test_while_draining_nobody_is_let_in(service):
    app, admission = make_app(service)
    assert isinstance(admission, Admission)
    import httpx

    async def drained():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            before = await client.get("/health/ready")
            admission.draining = True
            return (
                before,
                await client.post("/v1/completions", json=COMPLETION),
                [await client.get(path) for path in ("/health/ready", "/health/live", "/metrics")],
            )

    before, refused, (ready, live, metrics) = asyncio.run(drained())
    assert before.status_code == 200
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert error_of(refused)["code"] == "draining"
    assert (ready.status_code, live.status_code, metrics.status_code) == (503, 200, 200)


# Paths, failures, the log


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/chat.html", 404),
        ("PUT", "/health", 405),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_errors_of_paths_have_the_same_shape(service, method, path, status):
    response = send(service, method, path)
    assert response.status_code == status
    error_of(response)


def test_a_failure_is_told_in_the_same_shape_and_without_its_words(service, caplog, monkeypatch):
    def fail(*_):
        raise KeyError("the prompt's text")

    monkeypatch.setattr("dsa_jax.server.app.tokenize", fail)
    service.in_thread = lambda work, *arguments: fail()
    response = send(service, "POST", "/tokenize", json={"prompt": "he"})
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"
    assert "KeyError" in caplog.text and "the prompt's text" not in caplog.text + response.text


def test_the_log_has_neither_prompts_nor_keys(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    service = make_service(ScriptedEngine(), tmp_path, keys=(KEY,))
    for body in ({"prompt": "a secret"}, {"prompt": "a secret", "foo": 1}, {"prompt": ["a secret", 3]}):
        for key in (KEY, "sk-mistyped"):
            send(
                service,
                "POST",
                "/v1/completions?key=sk-in-query",
                json=body,
                headers={"authorization": f"Bearer {key}"},
            )
    send(service, "GET", "/%1b[31mred%0aPOST")
    own = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("dsa_jax"))
    assert own.count("POST /v1/completions") == 6
    assert not any(secret in own for secret in ("secret", KEY, "mistyped", "in-query", "\x1b"))
    assert len(own.splitlines()) == 7
