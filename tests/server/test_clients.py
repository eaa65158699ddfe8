"""The server as its users start it, and the clients that they use: these run in an environment of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest
from model_cases import small_config, small_model
from serving_cases import VOCAB, make_tokenizer

from dsa_jax import load_hf, save_hf
from dsa_jax.inference.text import encode_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLIENTS, SCRIPTS = ROOT / ".venv-clients" / "bin", ROOT / "tests" / "server" / "clients"
KEY = "sk-a-key-of-the-tests"
SECONDS = 300  # after which a client has failed
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights with a tokenizer, and a file with a key."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_hf(small_model(small_config(vocab_size=VOCAB, max_position_embeddings=512)), folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    keys = folder.parent / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    return folder


def launch(folder, *options):
    """Starts the command; returns its process and address when it answers."""
    port = free_port()
    command = f"-m dsa_jax serve {folder} --port {port} --pages 64 --no-warm --api-key-file {folder.parent / 'keys'}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with open(folder.parent / "log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command.split(), *options], env=environment, stderr=log, stdout=log
        )
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None and time.monotonic() < end, (folder.parent / "log").read_text()
        try:
            if httpx.get(f"{address}/health/ready").status_code == 200:
                return process, address
        except httpx.TransportError:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def address(folder):
    """The address of a running server, which ends well when it is told to."""
    process, address = launch(folder)
    try:
        yield address
        assert httpx.get(f"{address}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert KEY not in (folder.parent / "log").read_text()
    finally:
        process.kill()
        process.wait()


def run_client(*command, cwd=None, **environment):
    """The output of a client's program, which must succeed."""
    assert CLIENTS.exists(), "the clients are not installed: .ci/install_clients"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(CLIENTS / command[0]), *map(str, command[1:])], capture_output=True, text=True, timeout=SECONDS,
        cwd=cwd, env=kept | environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-3000:]
    return ended.stdout


def test_openais_client(address):
    assert "all right" in run_client("python", SCRIPTS / "openai_client.py", address, KEY)


def test_the_page_in_a_browser(address):
    assert "all right" in run_client("python", SCRIPTS / "page.py", address, KEY)


def test_the_description_fuzzed(address, tmp_path):
    options = f"--checks {CHECKS} --phases fuzzing --max-examples 40 --seed 1 --request-timeout 120".split()
    header = f"Authorization: Bearer {KEY}"  # it leaves its cache where it runs
    run_client("schemathesis", "run", f"{address}/openapi.json", "--header", header, *options, cwd=tmp_path)


TASKS = {
    "choices": dict(output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{c}}", doc_to_target="{{a}}"),
    "texts": dict(
        output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{q}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    ),
    "rolling": dict(
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}}",
        metric_list=[{"metric": "byte_perplexity"}],
    ),
}  # fmt: skip


def test_the_harness_scores_as_the_model_does(address, folder, tmp_path):
    """lm-evaluation-harness by tokens of the server's, against log-probabilities of the model itself."""
    docs = [{"q": f"hello {word} is", "c": ["a thing", "lo", "hé"], "a": 0} for word in ("sun", "</s>", "lo")]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    arguments = f"model=tiny,base_url={address}/v1/completions,tokenizer_backend=remote,max_length=256,auth_token={KEY}"
    run_client(
        "lm_eval", "--model", "local-completions", "--model_args", arguments + ",num_concurrent=2,max_retries=1",
        "--tasks", ",".join(TASKS), "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples",
        OPENAI_API_KEY=KEY, HF_HOME=str(tmp_path), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    [path] = (tmp_path / "out").rglob("samples_choices*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    model, tokenizer = load_hf(folder), make_tokenizer()
    for sample in samples:
        doc = docs[sample["doc_id"]]
        for choice, [[found, *_]] in zip(doc["c"], sample["resps"], strict=True):
            context = encode_text(tokenizer, doc["q"])
            ids = context + encode_text(tokenizer, " " + choice)  # the harness puts a space between
            log_probs = np.asarray(jax.nn.log_softmax(model.unembed(model(np.array([ids])).hidden), axis=-1))[0]
            expected = sum(log_probs[place - 1, ids[place]] for place in range(len(context), len(ids)))
            assert float(found) == pytest.approx(float(expected), abs=1e-3)
    assert len(samples) == 3 and len(list((tmp_path / "out").rglob("samples_*.jsonl"))) == 3


def test_nothing_is_left_of_a_server_that_was_killed(folder):
    """It is started again at once; its clients have seen their connections end."""
    for _ in range(2):
        process, address = launch(folder)
        try:
            headers = {"authorization": f"Bearer {KEY}"}
            body = {"prompt": "hello", "max_tokens": 400, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=headers, timeout=60) as response:
                lines = response.iter_lines()
                assert any(line.startswith("data: ") for line in lines)
                process.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(lines)
        finally:
            process.kill()
            process.wait()


def test_a_prompt_of_ten_million_bytes(folder):
    process, address = launch(folder, "--max-body", str(2**24))
    try:
        headers = {"authorization": f"Bearer {KEY}"}
        for text in ("the quick brown ", "\x00\x1b\x07\u202e", "a"):
            text = text * (10_000_000 // len(text.encode()))
            response = httpx.post(f"{address}/v1/completions", json={"prompt": text}, headers=headers, timeout=SECONDS)
            assert response.status_code in (400, 413) and response.json()["error"]["message"]
        assert httpx.get(f"{address}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
