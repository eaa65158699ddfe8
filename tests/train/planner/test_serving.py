"""The plan of serving: bytes as counted by hand, tokens that fit, times as recorded and in order, refusals."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx
from model_cases import model_parts
from train_cases import small_config, small_phases, write_preset

from dsa_jax import Config, PagedCache, Transformer, load_hf, save_hf
from dsa_jax.pallas_kernels.selection.select_keys import Config as SelectConfig
from dsa_jax.parallel.sharding import parse_mesh
from train.__main__ import main
from train.planner import hardware, serving, serving_command
from train.settings import RunConfig

SMALL = small_config()
LARGE = Config.deepseek_v32()
MESHES = {gpus: [parse_mesh(mesh) for mesh in meshes] for gpus, meshes in serving.MESHES.items()}
ALL_MESHES = [shape for shapes in MESHES.values() for shape in shapes]


def job(mesh="data=1", *, config=LARGE, weights="fp8", drafts=None):
    return serving.Job(config, weights, parse_mesh(mesh) if isinstance(mesh, str) else mesh, drafts)


# Bytes


def test_bytes_of_a_small_model_by_hand():
    """Counts one dense and one MoE layer; no expert's matrix is larger than a block, so each has a scale of 4 bytes."""
    attention = 16 * 16 + 16 * 2 * 12 + 16 * 12 + 8 * 2 * 16 + 2 * 8 * 16 + 16 * 4 * 8 + 16 * 8  # of 7 matrices
    norms, wide = 2 * 16 + 16 + 8, 16 * 4 + 8 + 8  # norms; index weights, the index key's weight and bias
    router = 4 * (16 * 4 + 4)
    vocabulary = 2 * (2 * 256 * 16 + 16)
    found = {
        "attention": 2 * (2 * attention + 2 * norms + 4 * wide),
        "other feed-forward": 2 * 3 * 16 * 16 + router + 2 * 3 * 16 * 8,
        "routed experts": 2 * 4 * 3 * 16 * 8,
        "vocabulary": vocabulary,
    }
    assert serving.weight_bytes(job(config=SMALL, weights="bfloat16")) == found
    assert serving.weight_bytes(job(config=SMALL)) == found | {"routed experts": 4 * 3 * (16 * 8 + 4)}


def by_name(planned):
    """Sums the bytes of parameters of one name."""
    found = {}
    for weight in serving.weights_of(planned):
        found[weight.name] = found.get(weight.name, 0) + weight.bytes
    return found


def test_a_shard_has_whole_blocks():
    """A width of two blocks is halved; one of a block and a half is not, and has two scales where it is whole."""
    two = small_config(moe_intermediate_size=256)
    assert by_name(job(config=two))["gate_proj_scale"] == 4 * 2 * 4
    assert by_name(job("tensor=2", config=two))["gate_proj_scale"] == 4 * 4
    broken = small_config(moe_intermediate_size=192)
    assert by_name(job(config=broken))["down_proj_scale"] == 4 * 2 * 4
    with pytest.raises(ValueError, match="tensor=2 must divide moe_intermediate_size 192 in whole FP8 blocks of 128"):
        job("tensor=2", config=broken)
    assert by_name(job("tensor=2", config=broken, weights="bfloat16"))["wk"] > 0


def test_planned_bytes_are_those_of_the_model():
    """The engine holds as much, but for router, index weights and norm, which it takes as the file has them."""
    config = Config.tiny(param_dtype="bfloat16", expert_dtype="fp8")
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))).moe_layers.mlp.experts)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert serving.weight_bytes(job(config=Config.tiny()))["routed experts"] == held


def test_bytes_of_the_published_model():
    """671,877,944,064 parameters: routed experts in e4m3, router and index weights in float32, others in bfloat16."""
    layers, moe, dim = 61, 58, 7168
    wide = layers * (dim * 64 + 2 * 128) + moe * (dim * 256 + 256)
    experts = moe * 256 * 3 * dim * 2048
    total = sum(serving.weight_bytes(job()).values())
    assert total == experts + 4 * experts // 128**2 + 2 * (671_877_944_064 - experts - wide) + 4 * wide
    assert total == 690_275_652_608
    half = sum(serving.weight_bytes(job(weights="bfloat16")).values())
    assert half == 2 * (671_877_944_064 - wide) + 4 * wide


@pytest.mark.parametrize("weights", serving.WEIGHTS)
def test_shards_hold_their_part_of_the_whole(weights):
    """Experts are split over both axes, heads and widths over `tensor`, nothing over copies; latents are whole."""
    whole = serving.weight_bytes(job(weights=weights))
    for shape in ALL_MESHES:
        part = serving.weight_bytes(job(shape, weights=weights))
        split = shape["expert"] * shape["tensor"]
        assert part["routed experts"] == whole["routed experts"] // split
        if shape["tensor"] == 1:
            assert {**part, "routed experts": 0} == {**whole, "routed experts": 0}
        else:
            assert whole["attention"] / shape["tensor"] < part["attention"] < whole["attention"]
    assert by_name(job("tensor=8"))["o_proj"] == by_name(job())["o_proj"] // 8
    assert by_name(job("tensor=8"))["wq_b"] == by_name(job())["wq_b"]


def test_bytes_of_a_token_of_cache():
    assert serving.latent_bytes(LARGE, "fp8") == 656 and serving.index_bytes(LARGE, "fp8") == 132
    assert serving.latent_bytes(LARGE, "bfloat16") == 1152 and serving.index_bytes(LARGE, "bfloat16") == 256
    assert serving.token_bytes(job()) == 61 * 788 and serving.token_bytes(job(weights="bfloat16")) == 61 * 1408
    assert serving.latent_bytes(SMALL, "fp8") == 8 + 4 + 2 * 4


def test_workspace_by_hand():
    """A prompt's chunk is bound by the rows of experts of the large model, and by the heads of one without experts."""
    found = serving.workspace_bytes(job("expert=8"), 32768)
    routed = 1.5 * 8 * (2 * 7168 + 3 * 2048)
    assert found["a chunk of a prompt"] == 4096 * 2 * (2 * 7168 + routed)
    assert found["its index scores"] == 4096 * 32768 * 4 == serving.PREFILL_SCORE_BYTES == SelectConfig().buffer_bytes
    assert found["index scores of decoding"] == 128 * 32768 * 4
    assert serving.workspace_bytes(job("expert=8"), 1024)["its index scores"] == 4096 * 1024 * 4
    dense = serving.workspace_bytes(job(config=small_config(first_k_dense_replace=2)), 64)
    assert dense["a chunk of a prompt"] == 4096 * (2 * (2 * 16 + 2 * (12 + 12 + 8)) + 4 * 4)


def test_prediction_layers_are_counted_where_they_draft(tmp_path):
    """Weights as `load_hf` leaves them and pages as `PagedCache` makes them, in both formats."""
    config = small_config(num_nextn_predict_layers=2, index_fp8=True)
    save_hf(nnx.merge(*model_parts(config)), tmp_path)
    held = nnx.state(load_hf(tmp_path, dtype="bfloat16").prediction_layers)
    drafting = job(config=config, weights="bfloat16", drafts="mtp")
    plain = job(config=config, weights="bfloat16", drafts="ngram")
    found = serving.weight_bytes(drafting)
    assert found.pop(serving.PREDICTION) == sum(x.nbytes for x in jax.tree.leaves(held))
    assert found == serving.weight_bytes(plain) == serving.weight_bytes(job(config=config, weights="bfloat16"))
    for planned, predicting in ((job(config=config, drafts="mtp"), True), (job(config=config), False)):
        cache = PagedCache(config, 3, format="fp8", predicting=predicting)
        assert cache.latents.nbytes + cache.index_keys.nbytes == 3 * 64 * serving.token_bytes(planned)


# What fits


@pytest.fixture
def memory(monkeypatch):
    """Sets the bytes of a GPU."""

    def set_bytes(count):
        monkeypatch.setattr(hardware, "MEMORY_BYTES", count)
        monkeypatch.setattr(hardware, "USABLE_FRACTION", 1)

    return set_bytes


def test_tokens_fit_in_whole_pages(memory):
    planned = job("expert=8")
    needed = sum(serving.weight_bytes(planned).values()) + sum(serving.workspace_bytes(planned, 4096).values())
    page = 64 * 61 * 788
    for extra, tokens in ((-page, 0), (0, 0), (page - 1, 0), (page, 64), (10 * page + 5, 640)):
        memory(needed + extra)
        assert serving.tokens_that_fit(planned, 4096) == tokens
    memory(needed + 10 * page)
    assert [serving.sequences_that_fit(planned, length, 4096) for length in (64, 65, 320, 641)] == [10, 5, 2, 0]


def test_tokens_that_fit_in_the_published_model():
    """Half of the bytes for weights leaves more than twice the cache, and heads over `tensor` keep each cache whole."""
    tokens = {str(shape): serving.tokens_that_fit(job(shape), 131072) for shape in ALL_MESHES}
    for shape in ALL_MESHES:
        planned = job(shape)
        needed = sum(serving.weight_bytes(planned).values()) + sum(serving.workspace_bytes(planned, 131072).values())
        room = int(143771 * 2**20 * 0.95) - needed
        assert tokens[str(shape)] == room // (64 * 48068) * 64 > 0
        assert planned.groups == shape["data"] * shape["expert"]
    eight, sixteen = (tokens[str(MESHES[gpus][0])] for gpus in (8, 16))
    assert sixteen > 2 * eight
    copies = next(shape for shape in MESHES[16] if shape["data"] == 2)
    assert tokens[str(copies)] == eight
    assert all(serving.tokens_that_fit(job(shape, weights="bfloat16"), 131072) == 0 for shape in MESHES[8])
    assert serving.tokens_that_fit(job(MESHES[16][0], weights="bfloat16"), 131072) > 131072


# Times


def test_lines_through_times():
    points = {1: 10.0, 3: 20.0, 5: 60.0}
    found = [serving.line_through(points, size) for size in (0.5, 1, 2, 3, 4, 5, 6)]
    assert found == [7.5, 10, 15, 20, 40, 60, 80]
    assert serving.line_through({4: 10.0, 5: 30.0}, 2) == 5  # the line leads below 0
    assert serving.line_through({4: 10.0}, 8) == 20 and serving.line_through({4: 10.0}, 2) == 10


def test_kernels_take_what_was_recorded():
    rates = serving.recorded_rates()
    for row in rates["attention"]:
        planned = job(f"tensor={128 // row['heads']}")
        assert serving.attention_seconds(planned, row["batch"]) == pytest.approx(row["microseconds"] / 1e6)
    for row in rates["selection"]:
        found = serving.selection_seconds(job("expert=8"), row["batch"], row["keys"])
        assert found == pytest.approx(row["microseconds"] / 1e6)
        shorter = serving.selection_seconds(job("expert=8"), 4 * row["batch"], row["keys"] // 4)
        assert shorter == pytest.approx(found)


def test_kernels_of_other_shapes():
    """More heads, keys, bytes take longer in proportion; a smaller shape takes no less."""
    wide = Config.deepseek_v32(num_attention_heads=256, index_topk=4096, index_n_heads=128)
    assert serving.attention_seconds(job(config=wide), 1) == pytest.approx(4 * serving.attention_seconds(job(), 1))
    assert serving.selection_seconds(job(config=wide), 1, 131072) == pytest.approx(
        2 * serving.selection_seconds(job(), 1, 131072)
    )
    half = job(weights="bfloat16")
    assert serving.attention_seconds(half, 16) == pytest.approx(1152 / 656 * serving.attention_seconds(job(), 16))
    assert serving.selection_seconds(half, 16, 131072) == pytest.approx(
        256 / 132 * serving.selection_seconds(job(), 16, 131072)
    )
    small = Config.deepseek_v32(index_topk=64, index_n_heads=4)
    assert serving.attention_seconds(job(config=small), 16) == serving.attention_seconds(job(), 16)
    assert serving.selection_seconds(job(config=small), 16, 4096) == serving.selection_seconds(job(), 16, 4096)


def test_products_are_bound_by_bytes_and_then_by_operations():
    """The embedding is not read; tied to the head, it is. Experts are read that a token chose: of all, 8 in 256."""
    memory_rate, flops_rate = serving.rate("memory_bytes"), serving.rate("product_flops")
    parts = serving.weight_bytes(job())
    read = sum(parts.values()) - parts["routed experts"] - 2 * 129280 * 7168
    assert serving.matrix_seconds(job(), 1) == pytest.approx(read / memory_rate)
    tied = Config.deepseek_v32(tie_word_embeddings=True)
    assert serving.matrix_seconds(job(config=tied), 1) == pytest.approx(read / memory_rate)
    assert serving.expert_seconds(job(), 1) == pytest.approx(parts["routed experts"] * 8 / 256 / memory_rate)
    chosen = 1 - (1 - 8 / 256) ** 32
    local = serving.weight_bytes(job("expert=8"))["routed experts"]
    assert serving.expert_seconds(job("expert=8"), 4) == pytest.approx(chosen * local / memory_rate)
    many = 1 << 16
    flops = 2 * many * 8 * 58 * 3 * 7168 * 2048
    assert serving.expert_seconds(job(), many) == pytest.approx(flops / flops_rate)


def test_exchanges_by_hand():
    exchanges = {kind: figure["value"] for kind, figure in serving.recorded_rates()["exchanges"].items()}
    row = 2 * 7168
    assert serving.exchange_seconds(job(), 4) == serving.exchange_seconds(job("data=2"), 4) == 0
    sums = (1 + 2 * 3 + 3 * 58) * 2 * 4 * row * 7 / 8 / exchanges["all-reduce"]
    assert serving.exchange_seconds(job("tensor=8"), 4) == pytest.approx(sums)
    travel = 2 * 58 * 4 * row * 8 * 7 / 8 / exchanges["ragged all-to-all"]
    assert serving.exchange_seconds(job("expert=8"), 4) == pytest.approx(travel)
    # Over two hosts a pair's quota is 32 slots, and 8 of the 15 others are on the other host.
    between = 2 * 58 * 15 * 32 * row * 8 / 15 / hardware.NETWORK_BYTES_PER_SECOND
    assert serving.exchange_seconds(job("expert=16"), 4) == pytest.approx(between)
    dense = small_config(first_k_dense_replace=2, num_attention_heads=4)
    assert serving.exchange_seconds(job("expert=2", config=dense), 4) == 0


def test_a_step_with_drafts_by_hand():
    """Four tokens go through the model, and one or four through the prediction layer, which reads the head each time.

    At batch 1 products are bound by the bytes of weights, of which the layer reads its own and the experts chosen.
    """
    config, batch, position = Config.deepseek_v32(num_nextn_predict_layers=1), 1, 32768
    plain, drafting = job(config=config), job(config=config, drafts="mtp")
    before, after = (serving.decode_step(each, batch, position) for each in (plain, drafting))
    rows = {row["batch"]: row["ratio"] for row in serving.recorded_rates()["verification"]}
    assert set(rows) == {1, 16, 128} and serving.verification_ratio(1) == rows[1]
    for part in ("selection", "attention"):
        assert after.seconds_by_part[part] == pytest.approx(rows[1] * before.seconds_by_part[part])
    assert after.seconds_by_part["matrices"] == pytest.approx(before.seconds_by_part["matrices"])
    chosen = [1 - (1 - 8 / 256) ** tokens for tokens in (1, 4)]
    assert after.seconds_by_part["experts"] / before.seconds_by_part["experts"] == pytest.approx(chosen[1] / chosen[0])
    layer = {weight.name: weight for weight in serving.weights_of(drafting) if weight.part == serving.PREDICTION}
    assert layer["eh_proj"].elements == 2 * 7168**2
    own = sum(w.bytes for w in serving.weights_of(drafting) if w.part == serving.PREDICTION and not w.is_routed)
    experts = 256 * 3 * (7168 * 2048 + 4 * 7168 * 2048 // 128**2)
    read = 3 * (own + 2 * (129280 * 7168 + 7168)) + (chosen[1] + 2 * chosen[0]) * experts
    attention = sum(before.seconds_by_part[part] for part in ("selection", "attention")) / 61
    expected = read / serving.rate("memory_bytes") + (rows[1] + 2) * attention
    assert after.seconds_by_part["drafting"] == pytest.approx(expected)
    assert after.tokens_to_gain == pytest.approx(after.seconds / before.seconds) and before.tokens_to_gain == 1
    by_text = serving.decode_step(job(config=config, drafts="ngram"), batch, position)
    assert by_text.seconds == pytest.approx(after.seconds - expected)
    two = job(config=dataclasses.replace(config, num_nextn_predict_layers=2), drafts="mtp")
    more = serving.drafting_seconds(two, batch, position) - expected  # the second draft takes all tokens in too
    more -= (chosen[1] - chosen[0]) * experts / serving.rate("memory_bytes")
    assert more == pytest.approx((rows[1] - 1) * attention)
    assert serving.workspace_bytes(drafting, 64)["index scores of decoding"] == 128 * 4 * 64 * 4


@pytest.mark.parametrize("weights", serving.WEIGHTS)
@pytest.mark.parametrize("shape", ALL_MESHES, ids=str)
def test_larger_batches_take_longer_and_give_more(shape, weights):
    planned, batches = job(shape, weights=weights), (1, 2, 5, 16, 17, 64, 128, 200)
    for position in (1, 4096, 32768, 131072):
        steps = [serving.decode_step(planned, batch, position) for batch in batches]
        for before, after in zip(steps, steps[1:], strict=False):
            assert before.seconds < after.seconds
            assert before.tokens_per_second < after.tokens_per_second
        later = serving.decode_step(planned, 16, position + 1)
        assert later.seconds > steps[3].seconds
    parts = steps[0].seconds_by_part
    assert math.isclose(steps[0].seconds, sum(parts.values())) and all(part >= 0 for part in parts.values())
    assert steps[0].tokens_per_second == planned.groups / steps[0].seconds


# What the command says


def printed(capsys, *arguments):
    """Reads what the command prints."""
    assert main(["plan", "--serve", *arguments]) == 0
    return capsys.readouterr().out


def test_the_tables(capsys):
    shown = printed(capsys, "--config", "deepseek_v32", "--gpus", "8")
    assert max(map(len, shown.splitlines())) <= serving_command.WIDTH
    planned = job("expert=8")
    tokens = serving.tokens_that_fit(planned, 131072)
    step = serving.decode_step(planned, 1, 32768)
    of_all = step.tokens_per_second
    figures = (f"{tokens:,}", f"{8 * tokens:,}", f"{1e3 * step.seconds:.1f}", f"{of_all:,.0f}", f"{of_all / 8:,.0f}")
    source = serving.recorded_rates()["attention"][0]["source"].split(":")[0]
    shown = " ".join(shown.split())
    for words in ("on 8 H200s", "expert=4,tensor=2", "48,068 bytes", *figures, source):
        assert words in shown, words
    assert "16 H200s" not in shown


def test_json(capsys):
    """Both numbers of GPUs; in bfloat16 the model does not fit on 8, and no step is planned there."""
    found = json.loads(printed(capsys, "--config", "deepseek_v32", "--weights", "bfloat16", "--json"))
    assert [plan["gpus"] for plan in found["plans"]] == [8] * 3 + [16] * 4
    for plan in found["plans"]:
        planned = job(plan["mesh"], weights="bfloat16")
        assert plan["weight_bytes"] == serving.weight_bytes(planned)
        assert plan["tokens"] == plan["tokens_a_group"] * planned.groups
        assert bool(plan["steps"]) == (plan["tokens"] > 0)
        for step in plan["steps"]:
            assert step["batch_a_group"] * step["position"] <= plan["tokens_a_group"]
            assert step["seconds"] == pytest.approx(sum(step["seconds_by_part"].values()))
            assert step["tokens_per_second_a_gpu"] * plan["gpus"] == pytest.approx(step["tokens_per_second"])
    assert {step["position"] for plan in found["plans"] for step in plan["steps"]} == {32768, 131072}
    assert found["rates"] == json.loads(json.dumps(serving.recorded_rates()))


def test_drafts_are_planned(capsys):
    """The published model has a prediction layer; its steps take longer, and pay where enough drafts are right."""
    arguments = "--config", "deepseek_v32", "--gpus", "8", "--position", "4096", "--drafts", "mtp"
    found = json.loads(printed(capsys, *arguments, "--json"))
    config = dataclasses.replace(LARGE, num_nextn_predict_layers=1)
    planned = job("expert=8", config=config, drafts="mtp")
    plan = found["plans"][0]
    assert found["drafts"] == "mtp" and plan["token_bytes"] == 62 * 788
    assert plan["weight_bytes"] == serving.weight_bytes(planned) and "prediction layers" in plan["weight_bytes"]
    step = serving.decode_step(planned, 16, 4096)
    row = next(each for each in plan["steps"] if each["batch_a_group"] == 16)
    assert row["seconds"] == step.seconds and row["tokens_to_gain"] == step.tokens_to_gain
    shown = " ".join(printed(capsys, *arguments).split())
    for words in ("48,856 bytes", "A step verifies 3 drafts", "whose time counts", f"{step.tokens_to_gain:.2f}"):
        assert words in shown, words


def test_the_largest_batch_that_fits(capsys):
    found = json.loads(printed(capsys, "--config", "deepseek_v32", "--gpus", "8", "--position", "4096", "--json"))
    for plan in found["plans"]:
        most = plan["tokens_a_group"] // 4096
        assert [step["batch_a_group"] for step in plan["steps"]] == [1, 16, 64, min(most, 128)]
    found = json.loads(printed(capsys, "--config", "deepseek_v32", "--gpus", "8", "--position", "131072", "--json"))
    batches = [step["batch_a_group"] for step in found["plans"][0]["steps"]]
    assert batches == [1, found["plans"][0]["tokens_a_group"] // 131072]


def test_a_small_model_of_a_run_and_of_a_folder(capsys, tmp_path):
    """Plans the meshes that its sizes allow, at no position beyond its own."""
    config = dataclasses.replace(SMALL, n_routed_experts=8)
    run = write_preset(RunConfig(config, tuple(small_phases().values())), tmp_path / "run.json")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "config.json").rename(folder / "config.json")
    for source in (run, folder):
        found = json.loads(printed(capsys, "--config", str(source), "--weights", "bfloat16", "--json"))
        meshes = {plan["mesh"] for plan in found["plans"]}
        assert meshes == {
            f"data={data},context=1,expert={expert},tensor={tensor}"
            for data, expert, tensor in ((1, 8, 1), (1, 4, 2), (1, 8, 2), (2, 8, 1))
        }
        assert {step["position"] for plan in found["plans"] for step in plan["steps"]} == {64}
        assert found["plans"][0]["sequence_tokens"] == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nothing"], "or a Hugging Face folder, got 'nothing'"),
        (["--weights", "int4"], "weights must be fp8 or bfloat16, got 'int4'"),
        (["--drafts", "model"], "drafts must be mtp or ngram, got 'model'"),
        (["--config", "tiny", "--drafts", "mtp"], "with prediction layers, got num_nextn_predict_layers = 0"),
        (["--gpus", "12"], "gpus must be 8 or 16, got 12"),
        (["--gpus"], "gpus must be followed by a number, got none"),
        (["--position"], "position must be followed by a number, got none"),
        (["--position", "0"], "position must be at least 1, got 0"),
        (["--position", "4096", "163841"], "position must be at most 163840, got 163841"),
        (["--mesh", "tensor=8"], "unknown arguments with --serve: --mesh tensor=8"),
        (["--weights", "bfloat16", "--gpus", "8"], "of which one gives 133.4; try --gpus 16"),
    ],
)
def test_refusals(capsys, arguments, words):
    config = [] if "--config" in arguments else ["--config", "deepseek_v32"]
    assert main(["plan", "--serve", *config, *arguments]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error and not out


def test_a_model_that_fits_nowhere(capsys, memory):
    memory(1 << 30)
    for weights, advice in (("bfloat16", "try --weights fp8"), ("fp8", "too large for the meshes that are planned")):
        assert main(["plan", "--serve", "--config", "deepseek_v32", "--weights", weights]) == 2
        assert advice in capsys.readouterr().err


def test_a_model_that_no_mesh_splits():
    config = small_config(num_attention_heads=3)
    with pytest.raises(ValueError, match="none of the meshes expert=8; .* must divide n_routed_experts 4"):
        serving.jobs(config, "fp8", 8)
