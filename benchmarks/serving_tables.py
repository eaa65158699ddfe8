"""The sections on decode and serving of docs/performance.md, in Markdown; `python -m benchmarks.tables` writes them."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import cost_by_position
from benchmarks.serving import GPU_DOLLARS, dollars
from train.reporting.results import first_rise

LAYERS = 61  # of the 671B model; attention in each
Rows = Sequence[Mapping[str, Any]]


def decode(attention: dict, selection: dict) -> str:
    """The section on the kernels of a decode step."""
    parts = {"sparse attention": attention.get("times")}
    parts |= {label: selection.get(name) for name, label in SELECTION.items()}
    recorded = [part for part in parts.values() if part]
    text = (
        f"{measured(recorded)} Each time is that of a call in a chain of calls in one program. *Not to exceed* is the "
        "time that was asked for; variants that do not run by default stand in the record alone."
    )
    notes = [f"The record notes: {note}" for note in dict.fromkeys(part["note"] for part in recorded if "note" in part)]
    cells = [
        (
            f"`{row['name'].split(',')[0]}`{_behind_comma(row['name'])}",
            row.get("batch", row.get("rows", row.get("tokens"))),
            row.get("heads", ""),
            row.get("keys", ""),
            _number(row["microseconds"]),
            _rate(row),
            _bound(row),
            row.get("version", row.get("note", "")),
        )
        for row in timings(recorded)
        if not row["name"].startswith("variant")
    ]
    header = "kernel", "batch", "heads", "keys", "µs", "rate", "not to exceed", "version, if not today's"
    return _paragraphs(text, *notes, table(header, cells), *failures(recorded), *absences(parts))


SELECTION = {"joined": "selection", "scores": "index scores", "select": "top-k", "write": "writes"}  # parts with times


def _behind_comma(name: str) -> str:
    """The rest of a name behind its first comma, with it."""
    return name[len(name.split(",")[0]) :]


def _bound(row: Mapping[str, Any]) -> str:
    """Tells the time that a kernel was not to exceed, and by how much it does."""
    if "must" not in row:
        return ""
    excess = row["microseconds"] / row["must"] - 1
    return f"{row['must']:g}" + (f", exceeded by {excess:.1%}" if excess > 0 else "")


def _rate(row: Mapping[str, Any]) -> str:
    if "tflops" in row:
        return f"{row['tflops']:.0f} TFLOP/s"
    return f"{row['tb_per_s']:.2f} TB/s" if "tb_per_s" in row else ""


STEP_PARTS = ("attention_us", "projections_us", "feed_forward_us", "unembedding_us")


def decode_step(results: dict) -> str:
    """The section on whole decode steps: those whose parts were timed, and the others in one table."""
    paragraphs = [f"{measured(map(_without_arguments, results.values()))} A part's time is µs of a call in a chain."]
    with_parts = {name: part for name, part in results.items() if any("parts" in row for row in timings([part]))}
    for name, part in with_parts.items():
        header = "batch", "position", "step", "sum of parts", "step ÷ sum", *STEP_HEADER, "idle"
        cells = [
            (
                row["batch"],
                f"{row['length']:,}",
                f"{1e3 * row['seconds']:.2f} ms",
                f"{1e3 * row['sum_seconds']:.2f} ms" if "sum_seconds" in row else "",
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                *(_number(row["parts"][key]) if "parts" in row else "" for key in STEP_PARTS),
                f"{row['idle_share']:.1%}" if "idle_share" in row else "",
            )
            for row in timings([part])
        ]
        paragraphs.append(
            f"{name[0].upper()}{name[1:]}, {part['weights']} weights, {part['cache'].upper()} cache; peak memory over "
            f"these batches {part['peak_gib']:.1f} GiB:"
        )
        paragraphs += [table(header, cells), *failures([part])]
    others = {name: part for name, part in results.items() if name not in with_parts}
    if others:
        cells = [
            (name, row["batch"], f"{row['length']:,}", f"{1e3 * row['seconds']:.2f} ms", f"{part['peak_gib']:.1f} GiB")
            for name, part in others.items()
            for row in timings([part])
        ]
        header = "model, and mesh", "batch", "position", "step", "peak memory a GPU"
        paragraphs += [OTHER_STEPS, table(header, cells), *failures(others.values())]
    return _paragraphs(*paragraphs)


OTHER_STEPS = (
    "Steps with experts, and on two GPUs of one host. Over `expert` the GPUs idle for more than half of a traced step."
)


def _without_arguments(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leaves a command's arguments out of the circumstances, which differ in every part."""
    circumstances = part["circumstances"]
    return {**part, "circumstances": {**circumstances, "command": circumstances["command"].split(" --")[0]}}


STEP_HEADER = ("attention, a layer", "projections, a layer", "feed-forward, a layer", "unembedding")


def cost(results: dict) -> str:
    """The section on what attention costs by position."""
    parts = {name: results.get(name) for name in cost_by_position.PARTS}
    shown = {"decode": _decode_cost, "prefill": _prefill_cost, "verification": _verification}
    made = [paragraph for name, make in shown.items() if (part := parts[name]) for paragraph in make(part)]
    return _paragraphs(measured(results.values()), *made, *absences(parts))


def _decode_cost(part: Mapping[str, Any]) -> list[str]:
    """Decode by batch and position, and where dense attention begins to cost more."""
    rows = timings([part])
    text = (
        "Decode, µs of a layer for one token of each sequence. *Dense* is FlashMLA's kernel and was not measured in "
        "this run: it is computed from two figures for an H200 in bfloat16, "
        f"{cost_by_position.DENSE_TFLOPS:.0f} TFLOP/s in a batch and {dense_single_us():.0f} µs for one sequence of "
        f"{cost_by_position.POSITIONS[-1]:,} keys, in proportion to the keys and without what a launch costs. Batch "
        f"128 shares the pages of 64 sequences. Dollars are those of a million tokens in {LAYERS} layers of attention "
        f"and projections at ${GPU_DOLLARS:g} a GPU-hour; the same projections count on both sides."
    )
    header = (
        "batch", "position", "selection", "sparse attention", "together", "projections", "dense (FlashMLA, computed)",
        "dense ÷ together", "dollars, sparse", "dollars, dense",
    )  # fmt: skip
    cells = [
        (
            row["batch"],
            f"{row['position']:,}",
            *(_number(row[f"{name}_us"]) for name in ("selection", "sparse_attention", "attention", "projections")),
            _number(row["dense_us"]),
            f"{row['ratio']:.2f}",
            *(f"{million_tokens(us):.3f}" for us in (decode_us(row, "attention"), decode_us(row, "dense"))),
        )
        for row in rows
    ]
    found = {batch: crossing([row for row in rows if row["batch"] == batch], *DECODE) for batch in batches(rows)}
    where = "; ".join(f"{place} at batch {batch}" for batch, place in found.items())
    crossovers = f"Dense attention costs more from this position on, interpolated: {where}."
    return [text, table(header, cells), crossovers, *failures([part])]


def _prefill_cost(part: Mapping[str, Any]) -> list[str]:
    """Prefill by position."""
    rows = timings([part])
    text = (
        f"Prefill, µs of a layer a token of a chunk of {cost_by_position.CHUNK:,} that ends at the position, or of all "
        "before it, projections included; *dense* is `multihead_attention` in the same run. Costs rise in proportion "
        "along a chunk, so a row's are those of the token in its middle, where crossovers and the chart have it."
    )
    header = "chunk ends at", "sparse", "dense", "dense ÷ sparse", "dollars, sparse", "dollars, dense"
    sides = ("sparse_us_per_token", "dense_us_per_token")
    cells = [
        (
            f"{row['position']:,}",
            *(f"{row[side]:.3g}" for side in sides),
            f"{row['ratio']:.2f}",
            *(f"{million_tokens(row[side]):.3f}" for side in sides),
        )
        for row in rows
    ]
    sparse, dense = (whole_prompt(rows, side) for side in PREFILL)
    said = (
        f"Dense attention costs more from a token at {crossing(rows, *PREFILL)} on, and {dense / sparse:.2f} times as "
        f"much for all of a prompt of {rows[-1]['position']:,} tokens, both interpolated."
    )
    return [text, table(header, cells), said, *failures([part])]


def _verification(part: Mapping[str, Any]) -> list[str]:
    """Four tokens of a sequence beside one."""
    header = "batch", "position", "1 token", "4 tokens", "4 ÷ 1"
    cells = [
        (
            row["batch"],
            f"{row['position']:,}",
            *(_number(row[f"attention_of_{count}_us"]) for count in (1, 4)),
            f"{row['ratio']:.2f}",
        )
        for row in timings([part])
    ]
    text = "Verification, µs of selection and sparse attention of a layer, for four tokens of each sequence beside one:"
    return [text, table(header, cells), *failures([part])]


def dense_single_us() -> float:
    """FlashMLA's dense decode of one sequence at the last position."""
    return cost_by_position.dense_decode_us(1, cost_by_position.POSITIONS[-1])


def decode_us(row: Mapping[str, Any], side: str) -> float:
    """Microseconds a token and layer of attention, "attention" or "dense", with projections."""
    return (row[f"{side}_us"] + row["projections_us"]) / row["batch"]


def million_tokens(us: float) -> float:
    """Dollars of a million tokens that take so many microseconds a layer each."""
    return dollars(1e6 / (LAYERS * us))


Side = Callable[[Mapping[str, Any]], float]
DECODE: tuple[Side, Side] = (lambda row: decode_us(row, "attention"), lambda row: decode_us(row, "dense"))
PREFILL: tuple[Side, Side] = (lambda row: row["sparse_us_per_token"], lambda row: row["dense_us_per_token"])


def batches(rows: Rows) -> list[int]:
    """The batches of rows, each once."""
    return list(dict.fromkeys(row["batch"] for row in rows))


def token_position(row: Mapping[str, Any]) -> float:
    """Gives the position of a row's token, of a chunk's tokens that in their middle."""
    return row["position"] - (row.get("tokens", 1) - 1) / 2


def whole_prompt(rows: Rows, side: Side) -> float:
    """Sums what all tokens up to the last row's position cost, interpolated between rows by rising position."""
    positions = np.arange(1, rows[-1]["position"] + 1)
    return float(np.interp(positions, [token_position(row) for row in rows], [side(row) for row in rows]).sum())


def crossover(rows: Rows, sparse: Side, dense: Side) -> float | None:
    """Interpolates the first position at which dense attention costs as much as sparse and then more.

    Args:
      rows: of one batch, by rising position.
      sparse: gives what a row's sparse attention costs.
      dense: gives what its dense attention costs.

    Returns:
      The position on straight lines between the rows', None where no two of them enclose one.
    """
    return first_rise((token_position(row), dense(row) - sparse(row)) for row in rows)


def crossing(rows: Rows, sparse: Side, dense: Side) -> str:
    """Says where dense attention begins to cost more, also where that is not among the positions measured."""
    found = crossover(rows, sparse, dense)
    if found is not None:
        return f"{found:,.0f}"
    if dense(rows[0]) >= sparse(rows[0]):
        return f"below {token_position(rows[0]):,.0f}"
    return f"beyond {token_position(rows[-1]):,.0f}"


def batching(results: dict) -> str:
    """The section on what other rows change, and on what `batch_invariant` costs."""
    header = "decode", "rows compared", "largest difference", "rows in doubt", "tokens unequal elsewhere", "same bits"
    header += tuple(f"step of {step['batch']}" for step in results["default"]["steps"])
    cells = [
        (
            {"default": "default", "batch_invariant": "`batch_invariant`"}[name],
            part["rows"],
            f"{part['error']:.2g}",
            f"{part['near_share']:.0%}",
            part["unequal_elsewhere"],
            "yes" if part["same_bits"] else "no",
            *(f"{1e3 * step['seconds']:.2f} ms" for step in part["steps"]),
        )
        for name, part in results.items()
    ]
    text = (
        f"{measured(results.values())} Two layers of the 671B shape, one with experts, random weights, FP8 pages: "
        f"logits (standard deviation {results['default']['deviation']:.1f}) in a batch beside those alone and behind a "
        "cached prefix. In doubt is a row whose best two logits lie within twice the largest difference."
    )
    return _paragraphs(text, table(header, cells))


def engine(results: dict) -> str:
    """The section on the engine: full batches, then requests as they come."""
    parts = {kind: [(name, part) for name, part in results.items() if name.startswith(f"{kind}:")] for kind in KINDS}
    made = [paragraph for kind in KINDS for name, part in parts[kind] for paragraph in KINDS[kind](name, part)]
    return _paragraphs(measured(results.values()), *made, *absences(parts))


def _steps(name: str, part: Mapping[str, Any]) -> list[str]:
    """Steps of full batches beside their floor."""
    text = (
        f"Steps of {_model(name, part)}, a full batch decoding. The floor is a chain of the `Runner`'s decode steps at "
        "these lengths, without a scheduler and without reading what is drawn; below zero, the engine's step was timed "
        "faster than that chain. Dollars are those of the slice."
    )
    header = "batch", "position", "step", "floor", "loss", "tokens/s", "dollars a million tokens"
    cells = [
        (
            row["batch"],
            f"{row['length']:,}",
            f"{row['step_ms']:.2f} ms",
            f"{row['floor_ms']:.2f} ms",
            f"{row['loss_percent']:.1f} %",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['dollars_per_million_tokens']:.3f}",
        )
        for row in timings([part])
    ]
    return [text, table(header, cells), *failures([part])]


def _load(name: str, part: Mapping[str, Any]) -> list[str]:
    """Requests that come whatever has been answered."""
    of = part["traffic"]
    text = (
        f"Load on {_model(name, part)}: for {of['seconds']:g} s requests come at random times, each with one of "
        f"{of['prefixes']} prefixes of {of['prefix_tokens']:,} tokens, about {of['own_tokens']} tokens of its own and "
        f"an answer of about {of['answer_tokens']}. A request is good if its first token came within "
        f"{of['first_token_limit']:g} s and the others every {1e3 * of['between_tokens_limit']:g} ms on average. "
        "Delays are medians and, behind the stroke, what 99 % do not exceed; hits are pages of prompts found again."
    )
    header = (
        "requests/s", "answered", "first token, ms", "between tokens, ms", "good requests/s", "tokens/s", "hits",
        "preempted", "compiled meanwhile", "dollars a million tokens",
    )  # fmt: skip
    cells = [
        (
            f"{row['rate']:g}",
            f"{row['answered']} of {row['requests']}",
            _delays(row["first_token_ms"]),
            _delays(row["between_tokens_ms"]),
            f"{row['good_per_second']:.1f} ({row['good_share'] or 0:.0%})",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['hit_rate']:.0%}",
            row["preemptions"],
            row["programs_compiled"],
            "" if row["dollars_per_million_tokens"] is None else f"{row['dollars_per_million_tokens']:.3f}",
        )
        for row in timings([part])
    ]
    return [text, table(header, cells), *failures([part])]


KINDS = {"steps": _steps, "load": _load}


def _model(name: str, part: Mapping[str, Any]) -> str:
    """Describes the runs of the engine, from a part's name and settings."""
    return f"{name.split(': ')[1]}, {part['weights']} weights, {part['cache'].upper()} cache, {part['rows']} rows"


def _delays(spread: Mapping[str, float] | None) -> str:
    return f"{spread['median']:.1f} / {spread['p99']:.1f}" if spread else ""


def acceptance(results: dict) -> str:
    """The section on drafts of a small model of bytes: how many are right, and whether texts are those without."""
    part = results["bytes"]
    of, last, texts = part["circumstances"], part["phases"][-1], part["prompts"]
    apart = [margin for row in part["rows"] for margin in row["margins"]]
    parted = f"of tokens whose log-probabilities are at most {max(apart):.1e} apart" if apart else "none"
    text = (
        f"{of['date']}, `{of['command']}`, jax {of['versions']['jax']} on {part['cores']} cores, one run of one seed: "
        f"{part['parameters']:,} parameters, whose cross-entropy was {last['lm_loss']:.2f} after {last['phase']}, that "
        f"of the prediction layer {last['mtp_loss_1']:.2f}. {texts} texts of {part['prompt_tokens']} bytes, continued "
        f"by {part['new_tokens']} in float32. Texts that part from those without drafts: {parted}."
    )
    cells = [
        (
            row["sampling"],
            row["drafter"],
            row["most"],
            f"{row['accepted']} of {row['proposed']}",
            f"{row['tokens_a_step']:.2f}",
            f"{texts - len(row['margins'])} of {texts}",
        )
        for row in part["rows"]
    ]
    header = "tokens", "drafts by", "at most", "right", "tokens a step", "texts as without drafts"
    return _paragraphs(text, table(header, cells))


def measured(parts: Iterable[Mapping[str, Any]]) -> str:
    """Names the card, the version, the date and the commands of parts, but for where the results were written."""
    commands: dict[str, list[str]] = {}
    for of in (part["circumstances"] for part in parts):
        where = f"One {of['card']}, jax {of['versions']['jax']}, {of['date']}"
        commands.setdefault(where, []).append("`" + re.sub(r" --out \S+", "", of["command"]) + "`")
    return " ".join(f"{where}, {' and '.join(dict.fromkeys(each))}." for where, each in commands.items())


def timings(parts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of parts that have a time."""
    return [row for part in parts for row in part["timings"] if "error" not in row]


def failures(parts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Says which rows have none, and why."""
    rows = [row for part in parts for row in (*part["timings"], *part.get("failed", ())) if "error" in row]
    names = ("case", "name", "work", "batch", "heads", "position", "length")
    labels = [", ".join(f"{key} {row[key]}" for key in names if key in row) for row in rows]
    return [f"Failed: {label} ({row['error']})." for label, row in zip(labels, rows, strict=True)]


def absences(parts: Mapping[str, Any]) -> list[str]:
    """Says which parts are not recorded."""
    return [f"Not measured: {', '.join(absent)}."] if (absent := [name for name in parts if not parts[name]]) else []


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _paragraphs(*texts: str) -> str:
    """Joins paragraphs, filled to the width of the documents, and tables, which are not."""
    filled = (text if text.startswith("|") else textwrap.fill(text, 120, break_on_hyphens=False) for text in texts)
    return "\n\n".join(filled)


def _number(us: float) -> str:
    """Microseconds, to a tenth where there are fewer than a hundred."""
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"
