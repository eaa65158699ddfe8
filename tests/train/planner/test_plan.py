"""The planner: exact bytes, collectives as compiled, products as counted by hand, refusals and what they advise."""

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST
from train_cases import small_config, small_params, small_phases, write_preset

from dsa_jax.parallel.sharding import AXES, describe, make_mesh, parse_mesh
from studies.tiny.settings import make_config
from train.__main__ import main
from train.planner import command as plan
from train.planner import costs, estimate
from train.planner import hardware as rates
from train.planner import trace as program
from train.presets import deepseek_v32
from train.settings import RunConfig, Stage
from train.state import abstract_batch, abstract_params, abstract_state, init_state, place_state, placed
from train.step import make_step

CONFIG = small_config(
    num_hidden_layers=5, first_k_dense_replace=2, num_attention_heads=4, kv_lora_rank=8, intermediate_size=32
)
EIGHT = parse_mesh("data=2,expert=2,tensor=2")


def job(phase="SPARSE", *, batch=8, length=32, micro=1, config=CONFIG):
    return estimate.Job(config, small_phases()[phase], batch, length, micro)


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Keeps what was traced."""
    plans, trace = {}, estimate.traced_plan

    def traced_plan(work, shape):
        key = work, tuple(shape.values()), program.CAPABILITY
        if key not in plans:
            plans[key] = trace(work, shape)
        return plans[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "traced_plan", traced_plan)
        yield


@pytest.fixture
def as_on_cpu(monkeypatch):
    """Traces as on a machine without a GPU, such as runs the test."""
    monkeypatch.setattr(program, "CAPABILITY", None)


@pytest.mark.parametrize("phase", ["BASE", "SPARSE"])  # Muon's moments, and AdamW's of both groups
def test_state_is_what_placed_arrays_take(phase):
    mesh, settings = make_mesh(EIGHT), small_phases()[phase]
    begin = jax.jit(init_state, static_argnums=1, compiler_options=FAST)
    state = place_state(begin(small_params(CONFIG), settings, np.zeros(2, np.uint32)), mesh)
    planned = estimate.state_bytes(job(phase), EIGHT)
    for name, tree in (("parameters", state.params), ("optimizer", state.opt_state)):
        taken = Counter()
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                taken[shard.device] += shard.data.nbytes
        assert set(taken.values()) == {sum(planned[name].values())}
    assert planned["parameters"]["MoE"] > planned["parameters"]["dense"] > 0


def test_moments_in_bfloat16_take_half_the_state():
    wide = job()
    rounded = dataclasses.replace(wide.settings.backbone, moment_dtype="bfloat16")
    narrow = dataclasses.replace(wide, settings=dataclasses.replace(wide.settings, backbone=rounded, indexer=rounded))
    moments, half = (estimate.state_bytes(each, EIGHT)["optimizer"] for each in (wide, narrow))
    for kind in ("dense", "MoE"):  # elsewhere the state has its counts of steps
        assert half[kind] == moments[kind] / 2 > 0


def sent_by_hlo(text):
    """Bytes that a device sends by kind of collective in a compiled program, loops unrolled."""
    computations, entry, name = defaultdict(list), None, None
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = match[2]
            entry = name if match[1] else entry
        else:
            computations[name].append(line)
    sent = Counter()

    def visit(name, times):
        for line in computations[name]:
            if match := re.search(r"= (.*?) (all-gather|reduce-scatter|all-reduce|all-to-all)\(", line):
                count, size = group_size(line), array_bytes(match[1])
                ring = {"all-gather": 1 / count, "all-reduce": 2 / count, "reduce-scatter": 1, "all-to-all": 1 / count}
                sent[match[2]] += times * size * (count - 1) * ring[match[2]]
            elif match := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                visit(match[1], times * int(trips[1]) if trips else times)
            elif match := re.search(
                r" (?:conditional\(.*branch_computations=\{.*?%?([\w.\-]+)\}|call\(.*to_apply=%?([\w.\-]+))", line
            ):
                visit(match[1] or match[2], times)

    visit(entry, 1)
    return sent


def group_size(line):
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(part.split("=") for part in match[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in match[2].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    (first,) = re.findall(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(first.split(","))


def array_bytes(types):
    widths = {"pred": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4}
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    return sum(widths[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays)


@pytest.mark.slow
def test_collectives_are_those_of_the_compiled_step(as_on_cpu):
    """To the byte; all-reduces but for the gradients' norm, which XLA sums over the shards after them."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=2, first_k_dense_replace=0)
    work, mesh = job("WARMUP", config=config), make_mesh(EIGHT)
    arguments = placed(abstract_state(config, work.settings), mesh), abstract_batch(8, 32, mesh)
    step = make_step(abstract_params(config)[0], work.settings, mesh=mesh)
    compiled = sent_by_hlo(step.lower(*arguments).compile(compiler_options=FAST).as_text())
    planned = {kind: sum(parts.values()) for kind, parts in estimate.traced_plan(work, EIGHT).sent.items()}
    assert planned.keys() == compiled.keys()
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert planned[kind] == compiled[kind] > 0
    assert planned["all-reduce"] <= compiled["all-reduce"] <= 1.01 * planned["all-reduce"]


def traced(function, *shapes):
    """Traces a function of float32 arrays."""
    return program.program_of(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)), {})


def scanned(weights, x):
    return jax.lax.scan(lambda x, w: (x @ w, jnp.sum(x @ w, axis=0)), x, weights)


MATRIX = 4 * 64 * 64


@pytest.mark.parametrize(
    ("function", "inputs", "bytes_"),
    [
        (lambda x: jnp.exp(x) * 2 + 1, 1, 0),  # elementwise, and returned: fused into whoever wants it
        (lambda x: x @ x, 1, MATRIX),
        (lambda x: jnp.exp(x @ x) @ x, 1, 2 * MATRIX),  # exp takes the place of its argument
        (lambda x: (x @ x) @ (x @ x.T), 1, 3 * MATRIX),
        (lambda x: jnp.sum(jnp.exp(x + 1)), 1, 4),  # fused into the sum
        (lambda x: jnp.zeros_like(x) @ x + jnp.zeros_like(x) @ x.T, 1, 3 * MATRIX),  # one array of zeros
        (lambda x: jnp.sort(x).reshape(-1).reshape(x.shape).T @ x, 1, 2 * MATRIX),  # views
    ],
)
def test_the_most_that_is_alive_at_once(function, inputs, bytes_):
    assert costs.peak_bytes(traced(function, *[(64, 64)] * inputs)) == bytes_


def test_a_loop_keeps_its_results_and_one_step():
    """Counts the sums [5, 64], the carry, its successor, and of the scanned weights the slice at hand."""
    assert costs.peak_bytes(traced(scanned, (5, 64, 64), (64, 64))) == 5 * 64 * 4 + 3 * MATRIX


def test_a_loop_runs_as_often_as_it_says_and_a_choice_once():
    def chosen(weights, x):
        x, sums = scanned(weights, x)
        return jax.lax.cond(sums[0, 0] > 0, lambda: x @ x @ x, lambda: x + 1)

    run = traced(chosen, (5, 64, 64), (64, 64))
    products = [done for done in costs.executed(run, {}) if done.op.name == "dot_general"]
    assert sum(done.times * costs.flops_of_product(done.op) for done in products) == 5 * 2 * 64**3


FAST_SHAPES = dict(num_attention_heads=16, kv_lora_rank=64, qk_rope_head_dim=64, index_n_heads=16, index_head_dim=64)


def test_operations_are_those_of_the_formulas():
    """Two dense layers, every product twice, for the remat, and for two gradients; constants have one."""
    config = small_config(**FAST_SHAPES, first_k_dense_replace=2, index_topk=64, dtype="bfloat16")
    work = job(batch=1, length=64, config=config)
    flops = {name: sum(parts.values()) for name, parts in estimate.traced_plan(work, estimate.ONE_DEVICE).flops.items()}
    tokens, layers, dim = 64, 2, config.hidden_size
    heads, query, latent, index = 16, config.q_lora_rank, config.latent_dim, 16 * 64
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    wide = dim * query + query * heads * head + dim * latent + heads * dim * config.v_head_dim
    wide += heads * 64 * (config.qk_nope_head_dim + config.v_head_dim) + 2 * dim * config.intermediate_size
    constant = query * index + dim * 64 + dim * 16 + config.intermediate_size * dim
    assert flops["products"] == 2 * tokens * (layers * (4 * wide + 3 * constant) + 4 * dim * config.vocab_size)
    pairs, forward = tokens * config.index_topk, 2 * heads * (latent + 64)
    assert flops["attention"] == 2 * layers * pairs * forward
    assert flops["attention, backward"] == layers * pairs * 2 * heads * (3 * latent + 2 * 64)
    assert flops["selection"] == layers * 2 * index * tokens * (tokens + 1) / 2
    assert flops["indexer's loss"] == 2 * layers * pairs * 2 * (heads * latent + 3 * index)


def test_rates_of_the_network():
    shape = parse_mesh("data=4,context=2,expert=16,tensor=2")
    nvlink, network = rates.nvlink_rates(), rates.NETWORK_BYTES_PER_SECOND
    assert all(2e11 < rate < 4.5e11 for rate in nvlink.values())  # what NVLink 4 can is 4.5e11
    for kind, axes, seconds in (
        ("all-reduce", ("tensor",), 1 / nvlink["all-reduce"]),
        (
            "all-gather",
            ("expert",),
            12 / 15 / 4 / network,
        ),  # 4 of 16 in a host, which share what comes in
        ("all-to-all", ("expert",), 12 / 15 / network),
        ("all-reduce", ("data",), 1 / network),
        ("all-gather", ("expert", "tensor"), 1 / nvlink["all-gather"]),  # more than 24 / 31 / 8 / that
        ("ragged all-to-all", ("expert",), 12 / 15 / network),
    ):
        found = rates.network_seconds(shape, costs.Collective(kind, axes, 1e12))
        assert found == pytest.approx(1e12 * seconds), (kind, axes)
    assert rates.at_number({16: 1.0, 64: 4.0}, 32) == 2.0 and rates.at_number({16: 1.0, 64: 4.0}, 128) == 4.0


# What the command says


@pytest.mark.slow
def test_the_calibration_is_computed(monkeypatch):
    """Computes it on the recorded peaks, and on others that are a tenth larger."""
    found = estimate.calibration()
    peaks = {phase: estimate.measured_step(phase).peak_gib * estimate.GIB for phase in ("SPARSE", "WARMUP")}
    raw = {phase: estimate.traced_plan(estimate.measured_job(phase), estimate.ONE_DEVICE) for phase in peaks}
    monkeypatch.setattr(estimate, "traced_plan", lambda work, _: raw[work.settings.name])
    plans = {phase: estimate.make_plan(estimate.measured_job(phase), estimate.ONE_DEVICE) for phase in peaks}
    needed = {phase: found.bytes_needed for phase, found in plans.items()}
    assert needed["SPARSE"] == pytest.approx(peaks["SPARSE"], abs=1)
    assert found.memory_error == pytest.approx(needed["WARMUP"] / peaks["WARMUP"] - 1)
    assert abs(found.memory_error) < 0.05 and 0 < found.copies < 2
    assert f"{found.memory_error:+.1%}" in str(found)
    step = estimate.measured_step
    larger = {phase: dataclasses.replace(step(phase), peak_gib=1.1 * step(phase).peak_gib) for phase in peaks}
    monkeypatch.setattr(estimate, "measured_step", larger.__getitem__)
    other = estimate.calibration.__wrapped__()
    assert other.copies > found.copies and other.memory_error < found.memory_error - 0.05


def test_what_a_config_may_be(tmp_path):
    """Reads a Hugging Face folder with the published recipe, computed in bfloat16; a run has its own."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    found = plan.load_run(str(tmp_path))
    assert [phase.indexer for phase in found.phases] == [phase.indexer for phase in deepseek_v32().phases]
    assert found.model == dataclasses.replace(
        CONFIG, dtype="bfloat16", index_rope_interleave=found.model.index_rope_interleave
    )
    run = RunConfig(CONFIG, tuple(small_phases().values()))
    (tmp_path / "run.json").write_text(json.dumps({"run": run.to_json()}))
    assert plan.load_run(str(tmp_path)) == plan.load_run(str(tmp_path / "run.json")) == run
    (tmp_path / "study.json").write_text(json.dumps(make_config().to_json()))  # whose data no planner needs to know
    assert plan.load_run(str(tmp_path / "study.json")).phases == make_config().phases
    assert estimate.Job.of(run, "WARMUP", 32).batch_size == run.phases[1].stages[-1].batch_size
    assert estimate.Job.of(deepseek_v32(), "BASE", 32).settings.backbone is not None


def refused(capsys, *arguments):
    """Reads the line that the command leaves on stderr."""
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


GOOD = {"--config": "deepseek_v32", "--mesh": "data=16,expert=16", "--seq-len": "131072"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--mesh": "data:16"}, "mesh must read like data=2,context=4"),
        ({"--mesh": "rows=16"}, "mesh axes must be among data, context, expert, tensor, got rows"),
        ({"--mesh": "expert=512"}, "expert=512 must divide n_routed_experts 256; nearest that does: 256"),
        ({"--mesh": "data=64"}, "data=64 must divide the batch size 480; nearest that does: 60"),
        ({"--batch": "96", "--micro-batches": "4"}, "divide the 6 rows of a shard of the batch, got 4; nearest: 3"),
        ({"--batch": "0"}, "batch must be at least 1, got 0"),
        ({"--config": "nothing"}, "or a Hugging Face folder, got 'nothing'"),
        ({"--config": "none.json"}, "preset must be a readable JSON file"),
        ({"--seq-len": "131073"}, "must be a multiple of 32"),
        ({"--seq-len": "262144"}, "at most the model's max_position_embeddings 163840, got 262144"),
        ({"--mesh": ""}, "mesh must name an axis at least, such as data=1, got none"),
        ({"--keep": "auto", "--budget": "nan"}, "budget must be GiB, more than 0, got nan"),
        ({"--keep": "auto", "--budget": "-1"}, "budget must be GiB, more than 0, got -1"),
        ({"--keep": "auto", "--colour": "blue"}, "unknown arguments: --colour blue"),
    ],
)
def test_bad_arguments(capsys, monkeypatch, changes, words):
    monkeypatch.setattr(plan, "fitting_plan", lambda *_: pytest.fail("planned"))
    arguments = [word for pair in (GOOD | changes).items() for word in pair]
    assert words in refused(capsys, *arguments)


@pytest.mark.slow
def test_a_mesh_that_is_too_small(capsys, monkeypatch, tmp_path):
    """Refused with the bytes, the limit and an axis that, grown as it says, fits with the fewest devices.

    One row cannot be split over data, nor three heads over tensor.
    """
    config = dataclasses.replace(CONFIG, num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=3)
    run = RunConfig(config, tuple(small_phases(Stage(1, 1, 32)).values()))
    path, small = str(write_preset(run, tmp_path / "small.json")), parse_mesh("data=1")
    work = estimate.Job.of(run, "WARMUP", 32)
    needed = {axis: estimate.make_plan(work, {**small, axis: 2}).bytes_needed for axis in ("context", "expert")}
    monkeypatch.setattr(rates, "USABLE_FRACTION", 1)
    monkeypatch.setattr(rates, "MEMORY_BYTES", min(needed.values()))
    error = refused(capsys, "--config", path, "--mesh", "data=1", "--seq-len", "32", "--phase", "WARMUP")
    before, after = f"{estimate.make_plan(work, small).bytes_needed:,} bytes", f"({min(needed.values()):,})"
    assert before in error and after in error
    axis = min(needed, key=lambda axis: needed[axis])
    assert f"grow {axis} to 2: " in error and "2 GPUs" in error
    assert main(["plan", "--config", path, "--mesh", f"{axis}=2", "--seq-len", "32", "--phase", "WARMUP"]) == 0
    shown = capsys.readouterr().out
    for words in ("parameters", "all-gather", "products", "in total", str(estimate.calibration())[:40], "100%"):
        assert words in shown


@pytest.fixture
def pretended(monkeypatch):
    """Plans of a formula instead of a trace: bytes 4096 / (data · expert²) of 64 that are there, seconds 1 / tensor."""
    monkeypatch.setattr(rates, "MEMORY_BYTES", 64)
    monkeypatch.setattr(rates, "USABLE_FRACTION", 1)
    monkeypatch.setattr(plan, "_state_bytes", lambda _, shape: math.inf if shape["expert"] > 4 else 0)

    def make(work, shape):
        needed = 4096 // (shape["data"] * shape["expert"] ** 2)
        return estimate.Plan(work, shape, {}, {}, {}, needed, {}, {}, {}, 1 / shape["tensor"], 0, 0, 0)

    monkeypatch.setattr(plan, "make_plan", make)


@pytest.mark.parametrize(
    ("mesh", "larger"),
    [
        ("expert=2", "data=16,context=1,expert=2,tensor=1"),  # expert is at its end with 4, which alone does not do
        ("data=4", "data=4,context=1,expert=4,tensor=1"),  # four times the devices; more data would take 16 times
        ("tensor=8", "data=64,context=1,expert=1,tensor=8"),
    ],
)
def test_the_smallest_growth_of_one_axis(pretended, mesh, larger):
    found = plan.larger_mesh(job(), parse_mesh(mesh))
    assert found is not None and describe(found.shape) == larger


def test_the_growth_of_several_axes(pretended, monkeypatch):
    """Grows several where none alone suffices, and none where nothing does."""
    sizes = {"data": 16, "expert": 2, "tensor": 2, "context": 2}
    monkeypatch.setattr(
        plan, "_state_bytes", lambda _, shape: math.inf if any(shape[axis] > sizes[axis] for axis in AXES) else 0
    )
    found = plan.larger_mesh(job(), parse_mesh("data=1"))
    assert found is not None and describe(found.shape) == "data=16,context=1,expert=2,tensor=1"
    sizes["data"] = 8
    assert plan.larger_mesh(job(), parse_mesh("data=1")) is None
    with pytest.raises(ValueError, match="no mesh that the model's sizes and the batch allow is large enough"):
        plan.fitting_plan(job(), parse_mesh("data=1"))


def test_the_best_mesh(pretended):
    """Finds the fastest of those that fit, most over tensor: data · expert² of 64 leaves 4 of 64 devices to tensor."""
    found = plan.best_plan(job(), 64)
    assert found is not None and found.shape == parse_mesh("data=4,expert=4,tensor=4")
    assert plan.best_plan(job(), 8) is None


@pytest.mark.parametrize("phase", ["WARMUP", pytest.param("SPARSE", marks=pytest.mark.variants)])
def test_prediction_layers_are_counted_by_themselves(phase):
    """Two beside two MoE layers: they differ by what joins embedding and hidden state, and each has logits too."""
    config = small_config(num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=4, kv_lora_rank=8)
    config = dataclasses.replace(config, num_nextn_predict_layers=2)
    alone = job(phase, config=config)
    along = dataclasses.replace(alone, settings=dataclasses.replace(alone.settings, predictions=True))
    without, plan = (estimate.traced_plan(each, EIGHT) for each in (alone, along))
    dim, tokens = config.hidden_size, 8 * 32 // 4
    joined = 2 * dim * dim // 2 + 3 * dim  # its rows are sharded over data, norms are on all
    assert plan.parameters["prediction"] == plan.parameters["MoE"] + 4 * 2 * joined == without.parameters["prediction"]
    assert "prediction" not in {**without.gradients, **without.optimizer, **without.flops["products"], **without.kept}
    assert plan.optimizer["prediction"] == 2 * plan.gradients["prediction"] > 0 and plan.kept["prediction"] > 0
    products, before = plan.flops["products"], without.flops["products"]
    join = 2 * 2 * tokens * 2 * dim * dim
    if phase == "WARMUP":  # forward, and again in the backward pass, whose gradients go to the indexers alone
        assert plan.gradients["prediction"] == plan.gradients["MoE"]
        assert products["prediction"] - products["MoE"] == 2 * join and "elsewhere" not in products
    else:  # and gradients by both operands; logits of three depths in place of one
        assert products["prediction"] - products["MoE"] >= 4 * join
        assert products["elsewhere"] == 3 * before["elsewhere"]
