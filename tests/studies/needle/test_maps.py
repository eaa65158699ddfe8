"""Maps come back from their file as they were, are added over seeds, drawn and tabled; random keys are random keys."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import KeyRange
from studies.needle.maps import Maps, draw_maps, random_selection, table_of
from studies.needle.questions import Cell

CELLS = (Cell(3, 4), Cell(4, 4))
MAPS = Maps({"BASE, dense": {1: {1024: CELLS, 300: CELLS}, 8: {1024: CELLS}}, "SPARSE, sparse": {1: {1024: CELLS}}})


def test_json_holds_them_whole():
    assert Maps.from_json(json.loads(json.dumps(MAPS.to_json()))) == MAPS


def test_seeds_are_added():
    both = Maps.add([MAPS, MAPS, MAPS])
    assert both.cells["BASE, dense"][8][1024] == (Cell(9, 12), Cell(12, 12))
    assert Maps.add([MAPS]) == MAPS


def test_a_table_gives_shares_over_all_depths():
    assert table_of(MAPS) == [
        "| weights and attention | needles a row | 300 | 1K |",
        "|---|---|---|---|",
        "| BASE, dense | 1 | 87.5% (53%–98%) | 87.5% (53%–98%) |",
        "| BASE, dense | 8 |  | 87.5% (53%–98%) |",
        "| SPARSE, sparse | 1 |  | 87.5% (53%–98%) |",
    ]


def test_a_figure_has_a_map_for_each(tmp_path):
    figure = draw_maps(MAPS)
    titles = [axes.get_title() for axes in figure.axes]
    assert {"BASE, dense: 1 needle a row", "BASE, dense: 8 needles a row", "SPARSE, sparse: 1 needle a row"} <= {
        *titles
    }
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes][0] == ["75%", "75%", "100%", "100%"]


@pytest.mark.parametrize("k", [1, 5, 64])
def test_random_keys_are_distinct_in_reach_and_others_for_each_query(k):
    start, stop = (
        jnp.asarray([[0] * 40, [7] * 40], jnp.int32),
        jnp.broadcast_to(jnp.arange(1, 41, dtype=jnp.int32), (2, 40)),
    )
    chosen = np.asarray(random_selection(KeyRange(start, stop), k))
    assert chosen.shape == (2, 40, k)
    for row, first in ((0, 0), (1, 7)):
        for query in range(40):
            keys = chosen[row, query][chosen[row, query] >= 0]
            assert len(keys) == min(k, max(query + 1 - first, 0))
            assert (np.diff(keys) > 0).all() and ((first <= keys) & (keys <= query)).all()
    if k == 5:
        assert len({tuple(each) for each in chosen[0, 20:]}) > 15
    assert (chosen == np.asarray(random_selection(KeyRange(start, stop), k))).all()
