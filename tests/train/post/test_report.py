"""The report: its verdicts, and the numbers that it takes from the metrics."""

import json

import numpy as np
import pytest
from stage_cases import policy_stage, post_config, start_stage, whole_stages

from train.phases import ON_POLICY
from train.post.report import curves_figure, markdown, smoothed, verdicts, write_report


def numbers(correct, tokens=10.0, interval=0.05):
    return {"correct": correct, "interval": interval, "output_tokens": tokens}


def test_verdicts_compare_with_what_a_stage_began_with_and_with_specialists():
    measured = {
        "start": {"tasks": {"copy": numbers(0.4), "twice": numbers(0.5)}},
        "specialist": {"tasks": {"copy": numbers(0.9, 8.0)}},
        "distilled": {"tasks": {"copy": numbers(0.7)}},
        "mixed": {"tasks": {"copy": numbers(0.88)}},
    }
    assert verdicts(post_config(), measured) == [
        "- **Below**: distilled: copy 0.700, below specialist (0.900), at 10.0 output tokens (8.0).",
        "- specialist: copy 0.900, above start (0.400), at 8.0 output tokens (10.0).",
        "- mixed: copy 0.880, above distilled (0.700), at 10.0 output tokens (10.0).",
        "- mixed: copy 0.880, within the intervals of specialist (0.900), at 10.0 output tokens (8.0).",
    ]


def test_a_dense_control_is_compared_with_its_stage():
    stages = start_stage(), policy_stage(), policy_stage("specialist-dense")
    measured = {name: {"tasks": {"copy": numbers(0.5)}} for name in ("specialist", "specialist-dense")}
    assert any(
        "specialist, sparse: copy 0.500, within the intervals" in line
        for line in verdicts(post_config(*stages), measured)
    )


def test_a_control_without_the_penalty_is_compared_on_the_same_task():
    stages = start_stage(), policy_stage(), policy_stage("specialist-free", tasks=("copy-free",))
    measured = {
        "specialist": {"tasks": {"copy": numbers(0.9, 8.0)}},
        "specialist-free": {"tasks": {"copy-free": numbers(0.92, 12.0)}},
    }
    line = "- specialist, with the length penalty: copy 0.900, within the intervals of specialist-free (0.920), "
    assert f"{line}at 8.0 output tokens (12.0)." in verdicts(post_config(*stages), measured)
    text = markdown(post_config(*stages), measured, {}, {}, None)
    assert "| stage | copy |" in text and "| specialist-free | 0.920 ± 0.050, 12.0 tokens |" in text


def test_on_policy_distillation_is_compared_with_the_mix():
    learner = policy_stage("on", ON_POLICY, tasks=("copy",), teachers=("specialist",))
    measured = {"mixed": {"tasks": {"copy": numbers(0.9)}}, "on": {"tasks": {"copy": numbers(0.7)}}}
    assert verdicts(post_config(*whole_stages(), learner), measured) == [
        "- **Below**: on: copy 0.700, below mixed (0.900), at 10.0 output tokens (10.0)."
    ]


def test_curves_are_means_of_five_steps():
    assert smoothed(np.arange(7.0)).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]


def test_the_report_is_written_from_the_files_of_the_stages(tmp_path):
    config = post_config(*whole_stages()[:2])
    for name, values in {"start": {}, "specialist": {"selection_overlap": 0.9}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "measured.json").write_text(json.dumps({"tasks": {"copy": numbers(0.5)}, **values}))
    watched = ("kl", "masked_share", "clipped_share", "log_ratio", "equal_groups", "dropped_episodes")
    plain = {"phase": "SPECIALIST", "seconds": 2.0, "output_tokens/copy": 9.0, **dict.fromkeys(watched, 0.25)}
    lines = [{"step": i, "reward": i / 10, "reward/copy": i / 10, **plain} for i in range(1, 11)]
    (tmp_path / "specialist" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(config, tmp_path, seconds=90.0).read_text()
    assert "| specialist | SPECIALIST 2 | 0.300 to 0.800 | 0.250 |" in text and "| 0.900 | 20 |" in text
    assert "1 min 30 s" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["curves"]["specialist"]["reward/copy"] == [i / 10 for i in range(1, 11)]
    axes = curves_figure(results["curves"], "reward").axes[0]
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(0.8)  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
