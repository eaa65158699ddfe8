"""Tests how much of a step's network its work hides: blocks of a few operations, and the step on two GPUs."""

import pytest
from train_cases import small_config, small_phases

from dsa_jax.parallel.sharding import parse_mesh
from train.planner import overlap
from train.planner.estimate import Job
from train.planner.trace import Block, Op, step_program


def op(inputs, output):
    return Op("mul", inputs, [output], {}, [], [])


def work(seconds):
    return overlap.Span(seconds, 0.0, 0.0, 0.0)


def sent(seconds):
    return overlap.Span(0.0, seconds, 0.0, 0.0)


def played(*parts):
    """Plays operations given as what they read, what they make, and their seconds."""
    block = Block([op(inputs, output) for inputs, output, _ in parts], [], [])
    span = overlap.play(block, [span for *_, span in parts])
    return span.waited, span.tail


def test_only_what_is_independent_hides():
    gather, reader, other = ([], 1, sent(3.0)), ([1], 2, work(1.0)), ([], 3, work(2.0))
    assert played(gather, reader) == (3.0, 0.0)
    assert played(gather, reader, other) == (1.0, 0.0)  # the other runs first, though it stands behind
    assert played(gather, ([1], 2, work(1.0)), ([2], 3, work(2.0))) == (3.0, 0.0)


def test_what_nothing_reads_is_the_tail():
    assert played(([], 1, work(2.0)), ([1], 2, sent(3.0)), ([1], 3, work(1.0))) == (0.0, 2.0)


def test_collectives_queue_and_what_is_read_first_goes_first():
    late, soon = ([], 1, sent(4.0)), ([], 2, sent(1.0))
    reads = ([2], 3, work(5.0)), ([1, 3], 4, work(1.0))
    assert played(late, soon, *reads) == (1.0, 0.0)
    assert played(([], 1, sent(4.0)), ([1], 2, sent(1.0)), ([2], 3, work(1.0))) == (5.0, 0.0)


def test_a_loops_own_waits_count():
    inner = overlap.Span(2.0, 1.0, 0.5, 0.0)
    assert played(([], 1, inner), ([1], 2, work(1.0))) == (0.5, 0.0)


@pytest.mark.parametrize("mesh", ["data=2", "context=2", "expert=2"])
def test_no_more_is_exposed_than_is_sent(mesh):
    config = small_config(num_hidden_layers=3, first_k_dense_replace=1)
    job, shape = Job(config, small_phases()["SPARSE"], 2, 64, 1), parse_mesh(mesh)
    program = step_program(job.trace(shape), shape)
    span = overlap._Player(program).span(program.block)
    exposed = overlap.exposed_seconds(program)
    assert exposed == span.waited + span.tail
    assert 0 < exposed <= span.network * (1 + 1e-9)
