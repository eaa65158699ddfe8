"""Says what a run is: its first lines on the console, and the settings in its report."""

from collections.abc import Mapping

import jax

from dsa_jax.parallel.sharding import AXES
from dsa_jax.parallel.sharding import describe as describe_mesh
from train import planner
from train.data import TEXT, Corpus, SplitName
from train.run import Run
from train.settings import PhaseSettings
from train.state import abstract_params
from train.watching.watch import drawn

ONE_DEVICE: dict[str, int] = {axis: 1 for axis in AXES}


def describe_run(run: Run, corpus: Corpus) -> dict[str, str | int | float]:
    """Says what is run, for the report."""
    model = run.config.model
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(model)[1])]
    return {
        "model": f"{sum(sizes):,} parameters, {model.num_hidden_layers} layers, {model.num_moe_layers} of them MoE",
        "K": model.index_topk,
        **{phase.name: _describe_stages(phase) for phase in run.config.phases},
        "training text": _describe_split(corpus, "train"),
        "held-out text": _describe_split(corpus, "held_out"),
        **_describe_packing(corpus, run.config.phases[-1].stages[-1].seq_len),
        **_describe_reading(corpus),
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }


def opening(run: Run, corpus: Corpus) -> dict[str, str]:
    """Says what is about to be run, and with what, for the first lines of a run."""
    shape = ONE_DEVICE if run.mesh is None else dict(run.mesh.shape)
    devices = "one" if run.mesh is None else f"{run.mesh.size}, {describe_mesh(shape)}"
    rows = {name: str(value) for name, value in describe_run(run, corpus).items()}
    return rows | {
        "epochs": _describe_epochs(run, corpus),
        "devices": devices,
        "memory": describe_memory(run, shape, activations=jax.default_backend() == "gpu"),
        "folder": f"{run.folder}, {_describe_saving(run)}",
    }


def describe_memory(run: Run, shape: Mapping[str, int], *, activations: bool) -> str:
    """Says what the planner expects a device to hold in the phase that takes most.

    Args:
      run: the run.
      shape: the sizes of all axes of the mesh.
      activations: whether they are counted too, for which the step is traced: they are planned for an H200.
    """
    needed = {phase.name: _planned_bytes(run, phase, shape, activations) for phase in run.config.phases}
    most = max(needed, key=lambda name: needed[name])
    what = "" if activations else " of parameters, gradients and optimizer state"
    return f"{_size(needed[most])} a device{what} in {most}, by the plan"


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _planned_bytes(run: Run, phase: PhaseSettings, shape: Mapping[str, int], activations: bool) -> float:
    stage = max(phase.stages, key=lambda stage: stage.seq_len * stage.batch_size // stage.micro_batches)
    job = planner.Job(run.config.model, phase, stage.batch_size, stage.seq_len, stage.micro_batches)
    if activations:
        return planner.make_plan(job, shape).bytes_needed
    return sum(sum(part.values()) for part in planner.state_bytes(job, shape).values())


def _describe_stages(phase: PhaseSettings) -> str:
    return " + ".join(f"{s.steps} steps of {s.batch_size} × {s.seq_len} tokens" for s in phase.stages)


def _describe_epochs(run: Run, corpus: Corpus) -> str:
    """Says how often the steps go through each source, all phases together."""
    sources = drawn(run.config, run.config.steps, corpus)
    return ", ".join(f"{epochs:.3g} of {name}" for name, (_, epochs) in sources.items())


def _describe_split(corpus: Corpus, split: SplitName) -> str:
    """Counts tokens and documents, of each source where there are several."""
    sources = corpus.sources(split)
    if len(sources) == 1 and sources[0].name == TEXT:
        return f"{sources[0].documents.size:,} tokens in {len(sources[0].documents)} files"
    counts = [f"{each.name} {each.documents.size:,} in {len(each.documents):,} documents" for each in sources]
    return "tokens of " + ", ".join(counts)


def _describe_packing(corpus: Corpus, seq_len: int) -> dict[str, str]:
    """Says what rows of the run's last stage lose, where documents are packed."""
    if all(source.pack == "concat" for source in corpus.sources("train")):
        return {}
    waste = corpus.waste("train", seq_len=seq_len)
    lost = (f"{name} {each.padding:.2%} padding, {each.cut:.2%} of documents cut" for name, each in waste.items())
    return {"packing": "; ".join(lost)}


def _describe_saving(run: Run) -> str:
    config = run.config
    saving = f"saved every {config.checkpoint_every} steps and behind each phase, the newest {config.keep_checkpoints}"
    best = " and the best" if config.keep_best else ""
    measured = f"; measured every {config.evaluate_every} steps" if config.evaluate_every else ""
    return f"{saving}{best} kept{measured}"


def _describe_reading(corpus: Corpus) -> dict[str, str]:
    """Says how documents end, and which text was not read."""
    rows = {} if corpus.tokenizer is None else {"end of a document": corpus.end_token or "no token"}
    files, size = corpus.left_out
    return rows | ({"text left out": f"{files:,} files of {size:,} bytes, past max_bytes"} if files else {})
