"""Every row changes one thing of the study, and the table sets rows beside the dense model continued."""

import dataclasses

import pytest

from studies.needle import settings
from studies.needle.ablations import CHANGES, CONTROL, SIZES, make_row, table


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_changes_what_it_says(name, tmp_path):
    size, preset, change = SIZES["card"], settings.card(), CHANGES[name]
    default = make_row(size, preset, CHANGES["default"], tmp_path)
    row = make_row(size, preset, change, tmp_path)
    differing = {
        f.name for f in dataclasses.fields(row.model) if vars(row.model)[f.name] != vars(default.model)[f.name]
    }
    changed = change.fields(default.model.num_hidden_layers)
    assert differing == {each for each, value in changed.items() if value != getattr(default.model, each)}
    assert bool(differing) == bool(changed)
    phases = [phase.name for phase in row.phases]
    if change.scratch:
        assert phases == ["SPARSE"] and row.phases[0].stages[-1].seq_len == size.length
    else:
        assert phases == (["WARMUP"] if change.warmup else []) + ["SPARSE"]
        assert row.phases[-1].stages == default.phases[-1].stages
        assert sum(phase.steps for phase in row.phases[:-1]) == round(change.warmup * size.warmup)
    assert change.says.endswith(".")
    assert max(stage.seq_len for phase in row.phases for stage in phase.stages) == size.length


def test_the_control_takes_the_steps_of_a_row(tmp_path):
    size, preset = SIZES["card"], settings.card()
    control = make_row(size, preset, CHANGES["default"], tmp_path, control=True)
    assert [phase.name for phase in control.phases] == ["DENSE_CONTROL"]
    assert control.phases[0].stages == make_row(size, preset, CHANGES["default"], tmp_path).phases[-1].stages


def test_the_table_tells_positions_within_k_from_those_beyond():
    losses = {"text": 2.0, "positions 0 to 7": 2.0, "positions 8 to 15": 2.0, "answers": 0.5}
    worse = {"text": 2.1, "positions 0 to 7": 2.02, "positions 8 to 15": 2.4, "answers": 1.5}
    row = {"answers": {"1": [1, 2], "8": [2, 2]}, "train_seconds": 1.0, "kl": []}
    mass = {"kept": {"indexer": 0.5, "oracle": 0.75, "window": 0.25}}
    lines = table({CONTROL: row | {"losses": losses}, "wrong_rope": row | {"losses": worse, "kl": [0.3]} | mass}, 8)
    assert len(lines) == 4 and "+1.00 % | +20.00 % | 1.500" in lines[3]
    assert "0.500 (0.750, 0.250) | 0.300" in lines[3] and "+0.00 %" in lines[2]
