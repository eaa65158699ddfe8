"""The commands `generate` and `chat` over a small model: what goes to standard output, and what is resumed."""

import dataclasses
import io
import json
import os
import re
import sys

import pytest
from model_cases import small_config, small_model

from dsa_jax import LLM, SamplingParams, save_hf
from dsa_jax.__main__ import main
from dsa_jax.chat import commands, lines
from dsa_jax.chat.lines import Lines, read_job, repair_results
from dsa_jax.chat.options import SamplingOptions
from dsa_jax.inference.params import StructuredOutputs

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(vocab_size=256, first_k_dense_replace=2, max_position_embeddings=256)
OPTIONS = SamplingOptions(max_tokens=4, seed=1, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a model of bytes, without a tokenizer.json, as training on bytes leaves it."""
    path = tmp_path_factory.mktemp("model") / "model"
    save_hf(small_model(CONFIG), path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, pages=12, rows=1)


@pytest.fixture(autouse=True)
def loaded_once(llm, monkeypatch):
    """The commands get the one model that is loaded, whose programs are compiled."""
    monkeypatch.setattr(commands, "LLM", lambda folder, **_: llm)


def text_of(llm, prompt, **changes) -> str:
    options = dataclasses.replace(OPTIONS, **changes)
    return llm.generate([prompt], options.params())[0].outputs[0].text


FLAGS = ["--max-tokens", "4", "--seed", "1", "--temperature", "0"]


def test_text_goes_to_standard_output_and_nothing_else(folder, llm, capsys, tmp_path, monkeypatch):
    assert main(["generate", str(folder), "--prompt", "abc", *FLAGS]) == 0
    expected = text_of(llm, "abc")
    assert capsys.readouterr() == (expected, "") and expected
    (tmp_path / "prompt").write_text("abc")
    assert main(["generate", str(folder), "--prompt-file", str(tmp_path / "prompt"), *FLAGS]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc")))
    assert main(["generate", str(folder), "--prompt-file", "-", *FLAGS, "--stop", expected[-1], "xyz"]) == 0
    assert capsys.readouterr().out == expected[: expected.index(expected[-1])]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "exactly one must be given of --prompt"), (["--prompt", "a", "--prompt-file", "b"], "exactly one"),
        (["--input", "a"], "--input and --output"), (["--prompt", "a", "--output", "b"], "--input and --output"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be at least 0"),
        (["--prompt", "a", "--n", "2"], "n must be 1"), (["--prompt", ""], "at least one"),
        (["--prompt", "a" * 300], "max_length = 256"), (["--prompt-file", "/nowhere"], "No such file"),
        (["--prompt-file", sys.executable], "must be UTF-8"),
        (["--prompt", "a", "--mesh", "data=3"], "must multiply to the 8 devices, got data=3"),
        (["--prompt", "a", "--mesh", "model=8"], "mesh"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_status_2(folder, capsys, arguments, words):
    assert main(["generate", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_mesh_gives_every_shard_of_rows_a_row(folder, llm, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(commands, "LLM", lambda folder, **options: given.update(options) or llm)
    assert main(["generate", str(folder), "--prompt", "abc", *FLAGS, "--mesh", "data=2,expert=2,tensor=2"]) == 0
    assert dict(given["mesh"].shape) == dict(data=2, context=1, expert=2, tensor=2) and given["rows"] == 4


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_hf()))
    for command in ("generate", "chat"):
        assert main([command, str(tmp_path), *(["--prompt", "a"] if command == "generate" else [])]) == 2
        assert "must hold a tokenizer.json, got none" in capsys.readouterr().err


def test_every_parameter_is_an_option():
    """But for what tells of tokens, which text has no place for."""
    fields = lambda kind: {field.name for field in dataclasses.fields(kind)}
    tells = {"logprobs", "prompt_logprobs", "return_selected", "return_routed", "return_kept"}
    params = fields(SamplingParams) - {"structured_outputs"} - tells
    assert fields(SamplingOptions) == params | fields(StructuredOutputs)
    assert SamplingOptions(max_tokens=16).params() == SamplingParams()
    params = SamplingOptions(regex="a+", logit_bias={"3": -1.0}).params()
    assert params.structured_outputs == StructuredOutputs(regex="a+") and params.logit_bias == {3: -1.0}


# JSON lines

INPUT = [
    b'{"prompt": "abc"}', b'{"prompt": [1, 2, 3], "id": "x", "n": 2}', b"not JSON",
    b'{"prompt": "abc", "id": "x"}', b"", b'{"prompt": "abd", "warmth": 1}', b'{"prompt": "abe", "top_p": 7}',
    b'{"prompt": 3}', b'{"prompt": "abf", "id": 1.5}', b'{"prompt": "' + b"a" * 300 + b'"}', b"\xff",
    b'{"prompt": "g", "top_p": "x"}', b'{"prompt": "h", "logit_bias": 3}',
    b'{"prompt": "last", "max_tokens": 2}',
]  # fmt: skip
BAD = {
    3: "not JSON", 4: "id 'x' of an earlier", 6: "warmth", 7: "top_p must be", 8: "prompt", 9: "id", 10: "max_length",
    11: "JSON", 12: "top_p must be a number", 13: "logit_bias",
}  # fmt: skip

SOURCE = b"\n".join(INPUT)


def run(llm, target, source=SOURCE, advance=lambda: None):
    """Runs lines; returns the results by id, and the complaints."""
    complaints = []
    own = Lines(llm.engine, OPTIONS, complaints.append)
    own.run(io.BytesIO(source), "in", target, advance)
    assert own.failed == len(complaints)
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert len({result["id"] for result in results}) == len(results)
    return {result["id"]: result["outputs"] for result in results}, complaints


def test_bad_lines_are_named_by_their_numbers_and_the_others_go_on(llm, tmp_path):
    advanced = []
    results, complaints = run(llm, tmp_path / "out", advance=lambda: advanced.append(1))
    assert {int(re.match(r"in line (\d+): ", each)[1]): each for each in complaints}.keys() == BAD.keys()
    for line, words in BAD.items():
        assert any(each.startswith(f"in line {line}: ") and words in each for each in complaints), (line, complaints)
    assert results.keys() == {1, "x", 14} and len(advanced) == len(INPUT)
    assert results[1] == [{"text": text_of(llm, "abc"), "tokens": 4, "finished": "length"}]
    assert [output["tokens"] for output in results["x"]] == [4, 4]
    assert results[14] == [{"text": text_of(llm, "last", max_tokens=2), "tokens": 2, "finished": "length"}]


MANY = b"\n".join(json.dumps({"prompt": f"p{i}", "max_tokens": 1 + i % 4}).encode() for i in range(9))


def test_a_run_that_was_cut_goes_on(llm, tmp_path):
    """Its last line is torn; what is done is not done again."""
    expected, _ = run(llm, tmp_path / "whole", MANY)
    target, count = tmp_path / "out", []

    def cut():
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llm, target, MANY, cut)
    while llm.engine.busy:
        llm.engine.step()
    whole = target.read_bytes()
    assert whole.count(b"\n") == 4 and whole.endswith(b"\n")
    target.write_bytes(whole + whole.splitlines()[0][:30])
    asked, add = [], llm.engine.add
    llm.engine.add = lambda request: asked.append(request) or add(request)
    try:
        results, _ = run(llm, target, MANY)
    finally:
        del llm.engine.add
    assert results == expected and len(asked) == 5 and target.read_bytes().startswith(whole)


def test_only_as_many_requests_wait_as_are_needed(llm, tmp_path, monkeypatch):
    most, step = [], llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: most.append(len(own._running)) or step())
    own = Lines(llm.engine, OPTIONS, print)
    own.run(io.BytesIO(MANY), "in", tmp_path / "out", lambda: None)
    assert max(most) == lines.WAITING


def test_the_command_takes_files_or_standard_input(folder, llm, tmp_path, capsys, monkeypatch):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(MANY)
    arguments = ["generate", str(folder), "--output", str(target), "--seed", "1", "--temperature", "0"]
    assert main([*arguments, "--input", str(source)]) == 0
    out, err = capsys.readouterr()
    assert not out and "9/9" in err and len(target.read_text().splitlines()) == 9
    assert main([*arguments, "--input", str(target)]) == 2
    assert "output must be another file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MANY + b"\n{}")))
    assert main([*arguments, "--input", "-"]) == 1
    assert "standard input line 10: must have a prompt" in capsys.readouterr().err
    assert len(target.read_text().splitlines()) == 9


def test_a_file_of_something_else_is_not_added_to(tmp_path):
    for content in (b"text\n", b'{"id": 1}\n{"x": 2}\n', b'{"id": []}\n'):
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(ValueError, match="must be a result of this command"):
            repair_results(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == content
    (tmp_path / "out").write_bytes(b"torn")
    assert repair_results(tmp_path / "out") == set() and os.path.getsize(tmp_path / "out") == 0


def test_a_line_that_is_too_long_is_skipped_whole(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 40)
    results, complaints = run(llm, tmp_path / "out", b'{"prompt": "' + b"a" * 100 + b'"}\n{"prompt": "b"}\n')
    assert results.keys() == {2} and complaints == ["in line 1: must have at most 40 bytes"]
    assert read_job(b'{"prompt": []}', 5, OPTIONS).id == 5


# Conversations


def test_a_line_in_is_an_answer_out(folder, llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n/params max_tokens=2\n/oops\n"))
    assert main(["chat", str(folder), "--system", "Hi.", *FLAGS]) == 1
    out, err = capsys.readouterr()
    expected = text_of(llm, "Hi.\nUser: x\nAssistant:", stop=("\nUser:",))
    assert out.startswith(commands.without_controls(expected) + "\n") and "max_tokens=2" in out
    assert err.startswith("error: commands are")


def test_what_a_model_cannot_do_is_said_at_once(folder, capsys, tmp_path):
    for arguments, words in (
        (["--thinking"], "thinking"),
        (["--tools", str(tmp_path / "tools")], "tools"),
        (["--n", "2"], "n must"),
    ):
        (tmp_path / "tools").write_text('[{"function": {"name": "f"}}]')
        assert main(["chat", str(folder), *arguments]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "tools").write_text("{")
    assert main(["chat", str(folder), "--tools", str(tmp_path / "tools")]) == 2
    assert "must hold a JSON list of tools" in capsys.readouterr().err


def test_what_is_not_installed_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.delitem(sys.modules, "dsa_jax.chat.terminal", raising=False)
    assert main(["chat", str(folder)]) == 2
    assert capsys.readouterr().err == "error: this command needs prompt_toolkit: pip install dsa-jax[serve]\n"
