"""Files that lie: configurations, headers and indexes are refused in one line that names file and key, unread."""

import contextlib
import copy
import functools
import io
import json
import os
import re
import shutil
import struct

import pytest
from convert_cases import SMALL, random_tensors, read, refused, same, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsa_jax import Config
from dsa_jax.__main__ import main
from dsa_jax.hf import checkpoint as hf_checkpoint
from dsa_jax.hf import files as hf_files
from dsa_jax.hf.convert import load_hf, save_hf

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound checkpoint in one file."""
    return write(tmp_path_factory.mktemp("whole") / "hf", random_tensors())


@pytest.fixture(scope="module")
def sharded(whole, tmp_path_factory):
    """The same in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    save_hf(load_hf(whole), folder, max_shard_bytes=200_000)
    return folder


@pytest.fixture
def unread(monkeypatch):
    """Fails if a tensor is read."""
    monkeypatch.setattr(hf_files.StoredTensor, "read", lambda *_: pytest.fail("a tensor was read"))


def split(file):
    """Reads a safetensors file as its header and the bytes after it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file, header, body):
    """Writes a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(data_offsets=[0, 320]), "overlaps|begins after a gap"),
        (dict(data_offsets=[10**9, 10**9 + 320]), "begins after a gap|but its data_offsets"),
        (dict(data_offsets=[2**64, 2**64 + 320]), "must have dtype, shape and two data_offsets"),
        (dict(data_offsets=[-320, 0]), "must have dtype, shape and two data_offsets"),
        (dict(data_offsets=[320, 0]), "but its data_offsets are [320, 0]"),
        (dict(data_offsets=None), "must have dtype, shape and two data_offsets"),
        (dict(data_offsets=[0.0, 320.0]), "must have dtype, shape and two data_offsets"),
        (dict(shape=[2**62, 2**62]), "but its data_offsets are"),
        (dict(shape=[-160]), "must have dtype, shape and two data_offsets"),
        (dict(shape=["160"]), "must have dtype, shape and two data_offsets"),
        (dict(shape=[True]), "must have dtype, shape and two data_offsets"),
        (dict(dtype=7), "must have dtype, shape and two data_offsets"),
        (dict(dtype="F32"), "is F32 [160] of 640 bytes, but its data_offsets are"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(change, named, whole, tmp_path, unread):
    folder = shutil.copytree(whole, tmp_path / "hf")
    header, body = split(folder / "model.safetensors")
    header[NORM] |= change
    join(folder / "model.safetensors", header, body)
    message = refused(folder)
    assert "model.safetensors is truncated or damaged" in message
    assert any(part in message for part in named.split("|"))
    assert NORM in message or "overlaps" in message or "gap" in message


def test_headers_are_strict_json(whole, tmp_path, unread):
    folder = shutil.copytree(whole, tmp_path / "hf")
    file = folder / "model.safetensors"
    header, body = split(file)
    text = json.dumps(header)
    twice = text[:-1] + f', "{NORM}": ' + json.dumps(header[NORM]) + "}"
    for hostile, named in (
        (twice, f"holds the key {NORM} twice"),
        ("[" * 50_000, "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        (text.replace(f'"{NORM}": {{', f'"{NORM}": {{"x": NaN, '), "not finite: NaN"),
    ):
        join(file, hostile.encode(), body)
        assert named in refused(folder)
    join(file, b"\xff\xfe{", body)
    assert "is not JSON" in refused(folder)
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "its header should have 9,223,372,036,854,775,808" in refused(folder)
    join(file, header, body + b"\0")
    assert "its tensors end at byte" in refused(folder)


@pytest.mark.parametrize(
    "file", ["../hf2/model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "\0", 7, None, [], {}]
)
def test_an_index_names_files_of_its_folder_alone(file, sharded, tmp_path, unread):
    folder = shutil.copytree(sharded, tmp_path / "hf")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = file
    (folder / INDEX).write_text(json.dumps(index))
    message = refused(folder)
    assert f"{INDEX} must name files of its own folder, got" in message and f"for {NORM}" in message


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}', "{", ""]
)
def test_an_index_that_is_none(text, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "hf")
    (folder / INDEX).write_text(text)
    assert f"{INDEX} is not the index of a sharded checkpoint" in refused(folder)


def test_an_index_holds_a_name_once(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "hf")
    (folder / INDEX).write_text(f'{{"weight_map": {{"{NORM}": "a", "{NORM}": "b"}}}}')
    assert f"holds the key {NORM} twice" in refused(folder)


def test_links_that_leave_the_folder_are_refused(sharded, whole, tmp_path, unread):
    folder = shutil.copytree(sharded, tmp_path / "hf")
    shard = next(iter(sorted(folder.glob("model-*"))))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert f"{shard.name} is truncated or damaged (it is a link that leaves the folder, to" in refused(folder)
    shard.unlink()
    shard.symlink_to(shard.name)
    assert shard.name in refused(folder)
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard.name} is truncated or damaged (it is no regular file)" in refused(folder)
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(whole / "config.json", single)
    (single / "model.safetensors").symlink_to(whole / "model.safetensors")
    assert "model.safetensors is truncated or damaged (it is a link that leaves the folder" in refused(single)


def test_links_within_a_folder_and_of_a_cache_are_followed(sharded, tmp_path):
    """A Hugging Face cache holds links in snapshots/REVISION to the files in blobs; the folder may be a link itself."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(sharded, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    same(read(sharded), random_tensors())
    for folder in (snapshot, tmp_path / "link"):
        assert load_hf(folder).config == load_hf(sharded).config


# Fuzzing: whatever stands in a file, it loads or is refused in one line; the command says it and ends with status 2.

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from([0, 1, -1, 2, 10**30, 1e308, -0.0, 10**400, "full", "dense", "yarn", "default", "bfloat16"])
KEYS_OF_ROPE = st.sampled_from(
    "type rope_type rope_theta factor original_max_position_embeddings beta_fast mscale mscale_all_dim truncate "
    "attention_factor partial_rotary_factor".split()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | KEYS_OF_ROPE, inner, max_size=4),
    max_leaves=6,
)
ROPES = st.dictionaries(KEYS_OF_ROPE, SCALARS, max_size=6)
KEYS = st.sampled_from(
    sorted(
        Config.tiny().to_hf().keys()
        | {"rope_parameters", "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"}
        | {"mlp_layer_types", "layer_types", "quantization_config", "partial_rotary_factor", "auto_map"}
    )
)
CHANGES = st.dictionaries(KEYS, VALUES | ROPES, min_size=1, max_size=3)
QUICK, LONG = 60, 500
fuzzed = functools.partial(settings, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_refusal(message, file):
    """Asserts that a message is one readable line that names the file."""
    assert file in message and len(message) < 1000 and "\n" not in message and not re.search(r"Error\b", message)


def config_survives(folder, changes):
    """Reads a configuration with these changes, or is refused."""
    file = folder / "config.json"
    file.write_text(json.dumps(SMALL.to_hf() | changes))
    try:
        config = Config.from_hf(folder)
    except ValueError as error:
        check_refusal(str(error), "config.json")
    else:
        assert Config.from_hf(config.to_hf()) == config
    try:
        Config.from_hf(SMALL.to_hf() | changes)
    except ValueError as error:
        check_refusal(str(error), "this configuration")


@given(changes=CHANGES)
@fuzzed(max_examples=4 * QUICK)
def test_any_configuration_is_read_or_refused(tmp_path, changes):
    config_survives(tmp_path, changes)


@pytest.mark.variants
@given(changes=CHANGES)
@fuzzed(max_examples=10 * LONG)
def test_many_configurations_are_read_or_refused(tmp_path, changes):
    config_survives(tmp_path, changes)


HEADER_CHANGES = st.tuples(
    st.integers(0, 60),
    st.sampled_from(["dtype", "shape", "data_offsets", ""]),
    VALUES
    | st.lists(st.integers(-4, 2000), min_size=1, max_size=3)
    | st.sampled_from(["F32", "BF16", "F16", "F8_E4M3"]),
)


def header_survives(whole, folder, change):
    """Loads a file whose header says something else of one tensor, or is refused by a command that writes nothing."""
    number, key, value = change
    header, body = split(whole / "model.safetensors")
    header = copy.deepcopy(header)
    name = sorted(header.keys() - {"__metadata__"})[number % (len(header) - 1)]
    if key:
        header[name][key] = value
    else:
        header[name] = value
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    join(folder / "model.safetensors", header, body)
    return command_survives(folder, "model.safetensors")


def command_survives(folder, file):
    """Runs `convert`, which works or says in one line why not and leaves nothing."""
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        hf_checkpoint.Checkpoint(folder)
    except ValueError as error:
        message = str(error)
        assert len(message) < 1000 and "\n" not in message
        assert file in message or str(folder) in message
        for arguments in (["info", str(folder)], ["convert", str(folder), str(out)]):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert main(arguments) == 2
            assert said.getvalue() == f"error: {message}\n"
        assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


@given(change=HEADER_CHANGES)
@fuzzed(max_examples=QUICK)
def test_any_header_is_read_or_refused(whole, tmp_path, change):
    header_survives(whole, tmp_path / "hf", change)


@pytest.mark.variants
@given(change=HEADER_CHANGES)
@fuzzed(max_examples=LONG)
def test_many_headers_are_read_or_refused(whole, tmp_path, change):
    header_survives(whole, tmp_path / "hf", change)


INDEX_CHANGES = st.tuples(
    st.integers(0, 60),
    VALUES | st.sampled_from(["config.json", INDEX, "../x", "/", "~", "model-00001-of-00003.safetensors"]),
    st.booleans(),
)


def index_survives(sharded, folder, change):
    """Loads files whose index says something else of one name, or is refused by a command that writes nothing."""
    number, value, whole_map = change
    shutil.copytree(sharded, folder, dirs_exist_ok=True)
    index = json.loads((sharded / INDEX).read_text())
    name = sorted(index["weight_map"])[number % len(index["weight_map"])]
    if whole_map:
        index["weight_map"] = value
    else:
        index["weight_map"][name] = value
    (folder / INDEX).write_text(json.dumps(index))
    command_survives(folder, "model")


@given(change=INDEX_CHANGES)
@fuzzed(max_examples=QUICK)
def test_any_index_is_read_or_refused(sharded, tmp_path, change):
    index_survives(sharded, tmp_path / "hf", change)


@pytest.mark.variants
@given(change=INDEX_CHANGES)
@fuzzed(max_examples=LONG)
def test_many_indexes_are_read_or_refused(sharded, tmp_path, change):
    index_survives(sharded, tmp_path / "hf", change)


@given(position=st.integers(0, 4000), byte=st.integers(0, 255))
@fuzzed(max_examples=QUICK)
def test_any_byte_of_a_header_may_be_wrong(whole, tmp_path, position, byte):
    folder = shutil.copytree(whole, tmp_path / "hf", dirs_exist_ok=True)
    content = bytearray((whole / "model.safetensors").read_bytes())
    content[position] = byte
    (folder / "model.safetensors").write_bytes(content)
    command_survives(folder, "model.safetensors")


def test_the_commands_line_is_short_whatever_the_path(tmp_path, capsys):
    far = tmp_path.joinpath(*["x" * 200] * 8)
    assert main(["info", str(far)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 1000
