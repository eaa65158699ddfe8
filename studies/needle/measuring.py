"""Measures a seed of the study: losses, answers, what selections keep and why; each part once, in resumable pieces."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from studies.needle.agreement import agreement, likeliest
from studies.needle.found import FOLDER, Found, Ledger, Selected, circumstances
from studies.needle.generated import ask_by_generation
from studies.needle.inside import Inside, far_queries, look_inside
from studies.needle.maps import DEPTHS, NEEDLES, Maps, Subject, ask_subject, has_room, questions_of, subjects_of
from studies.needle.questions import Cell, ask, attending
from studies.needle.rows import NeedleCorpus, draw_held_out
from studies.needle.settings import Preset
from train.evaluation.evaluate import Weights, held_out_losses, measure_selections
from train.evaluation.held_out import HeldOut
from train.evaluation.kept_mass import MIN_REACH
from train.experiment import control_run
from train.phases import DENSE_CONTROL, WINDOW_CONTROL, merge_groups, window_selection
from train.processes.stopping import Stopping
from train.reporting.results import read_curves, read_seconds
from train.run import Run
from train.state import abstract_params

QUERIES = 64  # of each row that is looked into
CURVES = ("step", "lm_loss", "kl", "kl_layers", "grad_norm_backbone", "grad_norm_indexer")


def measure_seed(
    run: Run,
    corpus: NeedleCorpus,
    preset: Preset,
    *,
    setup: Mapping[str, Any],
    record: Mapping[str, Any],
    controls: bool,
    beside: str | None = None,
    stopping: Stopping | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Found:
    """Measures a run that is trained, and its controls.

    Args:
      run: trained to its end.
      corpus: the text, and how needles are written.
      preset: how much is measured.
      setup: the run's description, kept with what is found.
      record: of the corpus.
      controls: whether the run has controls.
      beside: other work on the same device meanwhile, kept with the times.
      stopping: signals and the clock; what has been measured by then is kept.
      say: told what is done.

    Raises:
      StoppedError: if it was stopped.
    """
    ledger = Ledger(run.folder / FOLDER, run.config.steps, stopping, say)
    many = _draw(run, corpus, preset.loss_rows)
    few = _draw(run, corpus, preset.mass_rows)
    weights = _weights(run, controls)
    losses = {
        label: ledger.once(f"loss {label}", lambda own=own: _losses(run, own, many)) for label, own in weights.items()
    }
    warmed = ledger.once("selections after WARMUP", lambda: _selections(run, "WARMUP", few))
    final = ledger.once("selections after SPARSE", lambda: _selections(run, "SPARSE", few))
    agreed = ledger.once("agreement", lambda: _agreement(run, weights, many))
    inside = ledger.once("inside", lambda: _inside(run, few))
    answers = {
        subject.name: ledger.once(f"answers of {subject.name}", lambda own=subject: _answers(run, own, corpus, preset))
        for subject in subjects_of(run, controls=controls)
    }
    generated = ledger.once("generated", lambda: _generate(run, corpus, preset))
    records = [line for each in (run, *_controls(run, controls)) for line in each.records()]
    seconds = {phase: round(each, 2) for phase, each in read_seconds(records).items()}
    return Found(
        run.config.seed,
        dict(setup),
        dict(record),
        circumstances(beside),
        losses,
        Selected.of(warmed),
        Selected.of(final),
        agreed,
        {name: Inside.of(each) for name, each in inside.items()},
        Maps.from_json(answers),
        {name: Cell(**each) for name, each in generated.items()},
        read_curves(records, CURVES),
        seconds | {"measuring": round(ledger.seconds(), 2)},
        sum(line["data_seconds"] for line in records) / sum(line["seconds"] for line in records),
    )


def _weights(run: Run, controls: bool) -> dict[str, Weights]:
    """Lists the weights whose losses are measured, by their labels."""
    after = lambda run, phase: lambda: run.params_after(phase)  # noqa: E731
    found = [
        Weights("BASE, dense", after(run, "BASE"), "dense"),
        Weights("WARMUP, sparse", after(run, "WARMUP"), "sparse"),
        Weights("SPARSE, sparse", after(run, "SPARSE"), "sparse"),
        Weights("SPARSE, dense", after(run, "SPARSE"), "dense"),
    ]
    if controls:
        dense, window = _controls(run, controls)
        found += [
            Weights("DENSE_CONTROL, dense", after(dense, "DENSE_CONTROL"), "dense"),
            Weights("WINDOW_CONTROL, last K keys", after(window, "WINDOW_CONTROL"), "sparse", window_selection),
        ]
    return {each.label: each for each in found}


def _losses(run: Run, own: Weights, held_out: HeldOut) -> dict[str, float | None]:
    options: dict[str, Any] = dict(attention=own.attention, selection=own.selection)
    return held_out_losses(run.graphdef, own.read(), held_out, **options)


def _controls(run: Run, controls: bool) -> list[Run]:
    return [control_run(run, phase) for phase in (DENSE_CONTROL, WINDOW_CONTROL)] if controls else []


def _draw(run: Run, corpus: NeedleCorpus, rows: int) -> HeldOut:
    return draw_held_out(corpus, rows, 1, run.config.phases[-1].stages[-1].seq_len)


def _selections(run: Run, phase: str, held_out: HeldOut) -> dict[str, Any]:
    kept, losses = measure_selections(run.graphdef, run.params_after(phase), held_out, seed=run.config.seed)
    return {"kept": dataclasses.asdict(kept), "losses": losses}


PAIRS = (  # whose likeliest tokens are compared
    ("WARMUP, sparse", "BASE, dense"),
    ("SPARSE, sparse", "SPARSE, dense"),
    ("SPARSE, sparse", "DENSE_CONTROL, dense"),
    ("WINDOW_CONTROL, last K keys", "DENSE_CONTROL, dense"),
)


def _agreement(run: Run, weights: Mapping[str, Weights], held_out: HeldOut) -> dict[str, dict[str, float]]:
    batches = held_out.parts["text"]
    masks = {"text": [np.ones(batch.tokens.shape, bool) for batch in batches], **held_out.subsets["text"]}
    wanted = [pair for pair in PAIRS if all(name in weights for name in pair)]
    tokens = {}
    for name in dict.fromkeys(itertools.chain(*wanted)):
        attend = attending(weights[name].attention, weights[name].selection)
        tokens[name] = likeliest(run.graphdef, weights[name].read(), attend, batches)
    return {f"{ours} | {theirs}": agreement(tokens[ours], tokens[theirs], masks) for ours, theirs in wanted}


def _inside(run: Run, held_out: HeldOut) -> dict[str, Any]:
    model = merge_groups(run.graphdef, run.params_after("SPARSE"))
    reach = MIN_REACH * run.config.model.index_topk
    text = [(batch, far_queries(batch.tokens.shape[1], reach, QUERIES)) for batch in held_out.parts["text"]]
    found = {"text": look_inside(model, text)}
    masks = held_out.subsets["needles"]["answers"]
    pairs = zip(held_out.parts["needles"], masks, strict=True)
    places = [np.flatnonzero(mask[0] & (batch.stop[0] >= reach)) for batch, mask in pairs]
    least = min(min(map(len, places)), QUERIES)
    if least:
        chosen = [each[np.linspace(0, len(each) - 1, least).astype(int)] for each in places]
        found["answers"] = look_inside(model, list(zip(held_out.parts["needles"], chosen, strict=True)))
    return {name: dataclasses.asdict(each) for name, each in found.items()}


def _answers(run: Run, subject: Subject, corpus: NeedleCorpus, preset: Preset) -> Any:
    asked = ask_subject(run, subject, corpus, lengths=preset.lengths, needles=NEEDLES, questions=preset.questions)
    return Maps({subject.name: asked}).to_json()[subject.name]


def _generate(run: Run, corpus: NeedleCorpus, preset: Preset) -> dict[str, Any]:
    """Asks rows of the longest length for all their needles, by generation as it is served and by the forward pass."""
    a_row = max(count for count in NEEDLES if has_room(corpus, preset.lengths[-1], count))
    params, length = run.params_after("SPARSE"), preset.lengths[-1]
    served = abstract_params(dataclasses.replace(run.config.model, index_fp8=True))[0]
    drawn = lambda: questions_of(  # noqa: E731
        run, corpus, seq_len=length, a_row=a_row, questions=preset.generated_rows, batch_size=1
    )
    generated = ask_by_generation(merge_groups(served, params), drawn())
    cells = ask(run.graphdef, params, drawn(), DEPTHS, attend=attending("sparse"))
    return {"generated": dataclasses.asdict(generated), "forward": dataclasses.asdict(Cell.sum(cells))}


def found_path(folder: Path, seed: int) -> Path:
    """Names the file that keeps what was measured of a seed."""
    return folder / f"seed{seed}.json"
