"""Tests the choice of what a step keeps: products that each name spares, by the formulas, and a budget."""

import dataclasses

import pytest
from train_cases import small_config, small_phases

from dsa_jax.parallel.sharding import parse_mesh
from dsa_jax.remat import KEEPABLE
from train.__main__ import main
from train.commands.overrides import set_fields
from train.planner import command, estimate, keeping
from train.presets import deepseek_v32
from train.settings import RunConfig

ONE = parse_mesh("data=1")
SHAPES = dict(num_attention_heads=16, kv_lora_rank=64, qk_rope_head_dim=64, index_n_heads=16, index_head_dim=64)
CONFIG = small_config(**SHAPES, num_hidden_layers=1, first_k_dense_replace=1, index_topk=64, dtype="bfloat16")
JOB = estimate.Job(CONFIG, small_phases()["SPARSE"], 1, 64, 1)


def flops(*keep):
    plan = estimate.traced_plan(keeping.with_keep(JOB, keep), ONE)
    return {name: sum(parts.values()) for name, parts in plan.flops.items()}, sum(plan.kept.values())


@pytest.mark.slow
def test_each_name_spares_its_products_and_keeps_its_bytes():
    """One dense layer of 64 tokens."""
    (plain, kept), tokens = flops(), 64
    query, latent, dim = CONFIG.q_lora_rank, CONFIG.latent_dim, CONFIG.hidden_size
    heads, wide, index = 16, CONFIG.qk_nope_head_dim + CONFIG.qk_rope_head_dim, 16 * 64
    spared = {
        "latents": dim * (query + latent + 64 + 16),
        "queries": query * (heads * wide + index),
        "attention_output": heads * CONFIG.v_head_dim * dim,
        "feed_forward": 2 * dim * CONFIG.intermediate_size,
    }
    bytes_ = {
        "latents": 2 * (query + latent + 64) + 4 * 16,
        "queries": 2 * (heads * wide + index),
        "attention": 2 * heads * CONFIG.kv_lora_rank + 4 * heads,
        "attention_output": 2 * dim,
        "feed_forward": 2 * 2 * CONFIG.intermediate_size,
    }
    for name in ("latents", "queries", "attention_output", "feed_forward"):
        found, more = flops(name)
        assert plain["products"] - found["products"] == 2 * tokens * spared[name], name
        assert more - kept == tokens * bytes_[name], name
    found, more = flops("attention")
    assert found["attention"] == plain["attention"] / 2 and more - kept == tokens * bytes_["attention"]
    assert flops("indexer_kl")[0]["indexer's loss"] == plain["indexer's loss"] / 2


COSTS = {  # bytes, seconds saved
    **dict.fromkeys(KEEPABLE, (10, 0.0)),
    "attention": (60, 9.0),
    "indexer_kl": (40, 8.0),
    "latents": (30, 5.0),
    "router": (1, 0.5),
}


@pytest.fixture
def pretended(monkeypatch):
    """Plans of a formula: 100 bytes and seconds, and what is kept; two results together take 5 bytes more."""

    def make(job, shape):
        keep = job.settings.keep
        needed = 100 + sum(COSTS[name][0] for name in keep) + 5 * (len(keep) == 2)
        seconds = 100 - sum(COSTS[name][1] for name in keep)
        return estimate.Plan(job, shape, {}, {}, {}, needed, {}, {}, {}, seconds, 0, 0, 0)

    monkeypatch.setattr(keeping, "make_plan", make)


@pytest.mark.parametrize(
    ("room", "keep"),
    [
        (0, set()),
        (1, {"router"}),
        (40, {"indexer_kl"}),
        (62, {"attention"}),  # a router's score more would be 5 bytes too many
        (71, {"indexer_kl", "latents", "router"}),
        (1000, {"attention", "indexer_kl", "latents", "router"}),
    ],
)
def test_what_saves_most_within_the_budget_is_kept(pretended, room, keep):
    found = keeping.choose_keep(JOB, ONE, budget=100 + room)
    assert set(found.job.settings.keep) == keep and found.bytes_needed <= 100 + room


def test_a_step_that_does_not_fit_keeps_nothing(pretended):
    assert keeping.choose_keep(keeping.with_keep(JOB, ("router",)), ONE, budget=50).job.settings.keep == ()


def test_the_command_prints_what_is_chosen(pretended, monkeypatch, capsys):
    monkeypatch.setattr(command, "fitting_plan", lambda job, shape: keeping.make_plan(job, shape))
    monkeypatch.setattr(command, "lower_step", lambda _: "")
    monkeypatch.setattr(estimate.Job, "trace", lambda *_: None)
    monkeypatch.setattr(command, "calibration", lambda: "calibrated")
    budget = str(140.2 / estimate.GIB)
    arguments = ["--config", "tiny", "--mesh", "data=1", "--seq-len", "32", "--moment-dtype", "bfloat16"]
    assert main(["plan", *arguments, "--keep", "auto", "--budget", budget]) == 0
    shown = capsys.readouterr().out
    assert """phases.SPARSE.keep=["indexer_kl"]""" in shown and "moments in bfloat16" in shown
    assert main(["plan", *arguments, "--keep", "latents", "router"]) == 0
    assert "besides selections: latents, router;" in capsys.readouterr().out
    for wrong, words in (
        (["--keep", "latent"], "keep must name results among"),
        (["--budget", "3"], "needs --keep auto"),
    ):
        assert main(["plan", *arguments, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_a_run_says_what_it_keeps():
    run = set_fields(deepseek_v32(), ['phases.SPARSE.keep=["latents"]'])
    assert RunConfig.from_json(run.to_json()) == run and run.phases[1].keep == ("latents",)
    assert estimate.Job.of(run, "SPARSE", 32).settings.keep == ("latents",)
    with pytest.raises(ValueError, match="keep must name results among"):
        dataclasses.replace(run.phases[1], keep=("all",))
