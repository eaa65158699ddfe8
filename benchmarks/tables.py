"""Writes the tables of figures in docs/ from benchmarks/results/*.json:  python -m benchmarks.tables"""

import contextlib
import io
import json
import pathlib
import re
import statistics
import textwrap

from benchmarks import expert_tables, serving_tables
from benchmarks.measure import RESULTS
from studies.needle import summary
from studies.nsa import report as nsa_report
from train import planner

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


def peers(results: dict) -> str:
    """The section that sets our kernels beside those of others, in Markdown."""
    kernels = results["kernels"]
    lines = [
        textwrap.fill(f"Each pair was {kernels['source']}.", 120, break_on_hyphens=False),
        "",
        "| operation | shape | dsa_jax | best peer | |",
        "|---|---|---|---|---|",
    ]
    for row in kernels["rows"]:
        unit = {"tflops": "TFLOP/s", "milliseconds": "ms"}[row["unit"]]
        ours, theirs = row["value"], row["peer_value"]
        gain = ours / theirs if unit == "TFLOP/s" else theirs / ours
        cells = row["operation"], row["shape"], f"{ours} {unit}", f"{row['peer']} {theirs} {unit}", f"{gain:.2f} ×"
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| published elsewhere | figure | source |", "|---|---|---|"]
    lines += [f"| {row['work']} | {row['figure']} | {row['source']} |" for row in results["published"]]
    return "\n".join(lines)


def forward(results: dict) -> str:
    """The section on the forward path, in Markdown."""
    circumstances, peaks = (results["sparse_attention"][name] for name in ("circumstances", "peaks"))
    rows = [row for part in results.values() for row in part["timings"]]
    by_key = {(row["operation"], row["shape"], row["implementation"]): row for row in rows}
    text = (
        f"One {circumstances['card']}, jax {circumstances['versions']['jax']}, {circumstances['date']}, `python -m "
        f"benchmarks.forward`. In that run a bfloat16 matrix product reached {peaks['bf16_matmul_tflops']:.0f} TFLOP/s "
        f"({peaks['bf16_matmul_tflops_sustained']:.0f} sustained), an e4m3 one {peaks['fp8_matmul_tflops']:.0f} "
        f"({peaks['fp8_matmul_tflops_sustained']:.0f}), a copy {peaks['copy_tb_per_s']:.1f} TB/s. Times are medians of "
        "short windows of back-to-back calls; *sustained* is a long window, in which the card's power limit lowers its "
        "clock; the first call compiles."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| operation | shape | kernel | rate (share of the product) | sustained | XLA | first call |",
        "|---|---|---|---|---|---|---|",
    ]
    for (operation, shape, implementation), row in by_key.items():
        if implementation == "pallas" and not operation.startswith("DSA layer"):
            xla = by_key.get((operation, shape, "xla"))
            cells = (
                operation,
                shape,
                _time(row),
                _rate(row),
                _sustained(row),
                _times(xla, row),
                f"{row['first_call']:.1f} s",
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| whole DSA attention layer, 671B shape | kernels | peak memory | XLA | peak memory |",
        "|---|---|---|---|---|",
    ]
    layers = [row for row in rows if row["operation"].startswith("DSA layer")]
    for shape in dict.fromkeys(row["shape"] for row in layers):
        cells = []
        for implementation in ("pallas", "xla"):
            row = by_key.get(("DSA layer 671B", shape, implementation))
            cells += [_time(row), f"{row['peak_gib']:.1f} GiB"] if row else ["", ""]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


STEPS = ("sparse_step", "warmup_step", "dense_step", "base_step", "xla_steps")


def training(results: dict) -> str:
    """The section on the training path, in Markdown."""
    circumstances, peaks = (results["backward"][name] for name in ("circumstances", "peaks"))
    rows = {name: part.get("timings", []) for name, part in results.items()}
    text = (
        f"One {circumstances['card']}, jax {circumstances['versions']['jax']}, {circumstances['date']}, `python -m "
        f"benchmarks.training`; a bfloat16 matrix product reached {peaks['bf16_matmul_tflops']:.0f} TFLOP/s "
        f"({peaks['bf16_matmul_tflops_sustained']:.0f} sustained)."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| operation | shape | time | rate (share of the product) | sustained | XLA |",
        "|---|---|---|---|---|---|",
    ]
    operations = [row for name in ("backward", "sparse_loss", "warmup") for row in rows.get(name, [])]
    by_key = {(row["operation"], row["shape"], row["implementation"]): row for row in operations}
    for (operation, shape, implementation), row in by_key.items():
        if implementation == "pallas":
            xla = by_key.get((operation, shape, "xla"))
            cells = operation, shape, _time(row), _rate(row), _sustained(row), _times(xla, row)
            lines.append(f"| {' | '.join(cells)} |")
    steps = [row for name in STEPS for row in rows.get(name, [])]
    lines += steps and [
        "",
        "| one step, batch 1, 4 layers of the 671B shape | attention by | tokens | step | tokens/s | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in steps:
        cells = (
            row["operation"].removeprefix("training step "),
            {"pallas": "kernels", "xla": "XLA", "cudnn": "cuDNN, dense"}[row["implementation"]],
            row["shape"].split(",")[0].removeprefix("T "),
            f"{row['seconds']:.1f} s",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_gib']:.0f} GiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sharded(results: dict) -> str:
    """The section on two GPUs, in Markdown."""
    circumstances, rows = results["SPARSE"]["circumstances"], {name: part["timings"] for name, part in results.items()}
    everywhere, divided, same = rows["selection"]
    rates = ", ".join(f"{row['operation']} {row['gb_per_s']:.0f}" for row in rows["exchanges"])
    text = (
        f"Two {circumstances['card']}s of one host, jax {circumstances['versions']['jax']}, {circumstances['date']}, "
        f"`python -m benchmarks.sharded`: {rows['SPARSE'][0]['shape'].removeprefix('T 131072, ')}, 32 heads, 16 "
        "experts, bfloat16, one sequence of 131072 tokens. Efficiency is the speed over that of one GPU, divided by "
        "two. Losses of the first step differ by rounding: over `tensor` heads and width are summed in two parts. A "
        f"GPU sent so many GB/s: {rates}. Selecting all queries' keys takes {_time(everywhere)} where each of two GPUs "
        f"does it for all queries, {_time(divided)} where each does it for half of them and they exchange indices; the "
        f"bits are {'the same' if same['same_bits'] else 'not the same'}."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| one step | mesh | step | tokens/s | efficiency | peak memory a GPU | loss differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows["SPARSE"] + rows["WARMUP"]:
        alone = row["gpus"] == 1
        cells = (
            row["operation"].removeprefix("training step "),
            row["mesh"],
            f"{row['seconds']:.2f} s",
            f"{row['tokens_per_second']:,.0f}",
            "" if alone else f"{row['efficiency']:.0%}",
            f"{row['peak_gib']:.0f} GiB",
            "" if alone else f"{row['relative_difference']['loss']:.0e}".replace("0e+00", "0"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plan(results: dict) -> str:
    """The section on the 671B model at 128K, in Markdown."""
    part, runs = results["plans"], results["runs"]["rows"]

    def spread(name):
        errors = [row[f"{name}_error"] for row in runs]
        return f"{min(errors):+.0%} to {max(errors):+.0%}"

    circumstances, calibration, limit = (part[name] for name in ("circumstances", "calibration", "usable_gib"))
    text = (
        f"`python -m benchmarks.plan`, jax {circumstances['versions']['jax']}, {circumstances['date']}: of the meshes "
        "of so many H200s, tried by descent, the one that is planned to train fastest. Nothing of it was run. State is "
        "exact; the other bytes are a walk over the traced step, calibrated on the measured peak of the SPARSE step "
        f"on one GPU ({calibration['copies']:.2f} further copies of the gradients, for what it misses), error on the "
        f"WARMUP step: {calibration['memory_error']:+.1%}. {limit:.0f} GiB of a card are taken to be usable. Seconds "
        f"are at the measured rates, for one H200 off by {calibration['sparse_seconds_error']:+.0%} (SPARSE) and "
        f"{calibration['warmup_seconds_error']:+.0%} (WARMUP); exchanges within a host of eight are at the measured "
        "rates, between hosts at an assumed 50 GB/s a GPU each way, none of them hidden behind compute. On the steps "
        f"measured on one GPU and on two it errs by {spread('memory')} in memory and {spread('seconds')} in time."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| phase | GPUs | mesh | parameters, gradients, optimizer | needed a GPU | sent a GPU and step | compute + "
        "network a step | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        lines.append(f"| {row['phase']}, batch {row['batch_size']} | {row['gpus']} | {' | '.join(_planned(row))} |")
    return "\n".join(lines)


def memory(results: dict) -> str:
    """The section on what bfloat16 moments and a choice of what is kept make of the SPARSE step, in Markdown."""
    part = results["memory"]
    circumstances = part["circumstances"]
    text = (
        f"`python -m benchmarks.plan --only memory`, jax {circumstances['versions']['jax']}, {circumstances['date']}: "
        f"the step of SPARSE above, of 480 sequences, with moments in bfloat16. {part['usable_gib']:.0f} GiB of a card "
        "are taken to be usable. The mesh is the fastest with nothing more kept; what is kept there is chosen by the "
        "planner."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| GPUs | mesh | kept for the backward pass | needed a GPU | compute + network a step | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        mesh = row.get("mesh", "").replace(",", ", ")
        if not row["fits"]:
            lines.append(
                f"| {row['gpus']} | none fits; least bytes found: {mesh} | | {row['needed_gib']:.0f} GiB | | |"
            )
            continue
        for kept, found in (("", row), (", ".join(row["keep"]), row["keeping"])):
            seconds = f"{found['compute_seconds']:.0f} + {found['network_seconds']:.0f} s"
            cells = mesh, kept, f"{found['needed_gib']:.0f} GiB", seconds, f"{found['tokens_per_second']:,.0f}"
            lines.append(f"| {row['gpus']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _planned(row):
    """The cells of a row of the plan after its GPUs."""
    if row["planned_gpus"] > row["gpus"]:
        state = f"parameters, gradients and optimizer alone take {row['least_state_gib']:.0f} GiB"
        return f"none fits: {state} or more; {row['planned_gpus']} GPUs are enough", *[""] * 5
    state = ", ".join(f"{row[f'{name}_gib']:.1f}" for name in ("parameters", "gradients", "optimizer"))
    times = [
        f"**{row[f'{name}_seconds']:.0f}**" if row["binds"] == name else f"{row[f'{name}_seconds']:.0f}"
        for name in ("compute", "network")
    ]
    return (
        row["mesh"].replace(",", ", "),
        f"{state} GiB",
        f"{row['needed_gib']:.0f} GiB",
        f"{sum(row['sent_gib'].values()):,.0f} GiB",
        f"{times[0]} + {times[1]} s",
        f"{row['tokens_per_second']:,.0f}",
    )


def overlap(results: dict) -> str:
    """The section on what is sent beside compute, in Markdown."""
    first = next(iter(results.values()))
    circumstances = first["circumstances"]
    text = (
        f"`python -m benchmarks.overlap`, jax {circumstances['versions']['jax']}, {circumstances['date']}: SPARSE "
        f"steps, {first['shape']}, compiled for two {first['compiled_for']}s, and not run. What is sent takes its time "
        "at the recorded rates of one host, and so do products; other work counts by the bytes that it moves, which is "
        "less than kernels take. A GPU waits where what stands between a collective's start and its end is shorter."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| mesh | sent a GPU and step | takes | a GPU waits | of it | most of it for |",
        "|---|---|---|---|---|---|",
    ]
    for mesh, row in results.items():
        kind, most = max(row["kinds"].items(), key=lambda item: item[1]["exposed_seconds"])
        lines.append(
            f"| {mesh} | {row['gb_sent']:.1f} GB | {_time(row)} | {_time({'seconds': row['exposed_seconds']})} | "
            f"{row['exposed_share']:.0%} | {kind}, {_time({'seconds': most['exposed_seconds']})} |"
        )
    return "\n".join(lines)


def data(results: dict) -> str:
    """The section on the data of training, in Markdown."""
    opening, circumstances = results["opening"], results["opening"]["circumstances"]
    text = (
        f"Opening {opening['tokens']:,} tokens in {opening['shards']:,} shards took {opening['seconds']:.1f} s and "
        f"{opening['process_mib']:.0f} MiB, the process included ({opening['cores']} cores, "
        f"{circumstances['date']}, `python -m benchmarks.data`). Rows come from files that lie in memory."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| `--pack` | rows of | tokens/s, median | slowest | padding | documents cut |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("concat", "best_fit"):
        part = results[name]
        rates = [f"{part[rate] / 1e6:.0f} M" for rate in ("tokens_per_second", "least_tokens_per_second")]
        shares = [f"{part[share]:.2%}" for share in ("padding", "cut_documents")]
        lines.append(f"| {' | '.join([f'`{name}`', f'{part["length"]:,}', *rates, *shares])} |")
    return "\n".join(lines)


def moments(results: dict) -> str:
    """The section on how moments are stored, in Markdown."""
    first, rows = next(iter(results.values())), [row for part in results.values() for row in part["rows"]]
    most = max(abs(row["difference"]) for row in rows)
    seeds = max(statistics.stdev(run["held_out"] for run in row["runs"]) for row in rows)
    text = (
        f"{first['parameters']:,} parameters, {first['steps']} steps of {first['batch_size']} × {first['seq_len']} "
        f"bytes of source code, {first['seeds']} seeds; {first['circumstances']['date']}, `python -m "
        "benchmarks.moments`. Differences are from float32 with the same seed, with the standard error of their mean. "
        f"The largest is {most:.4f}; by their seeds alone runs differ with a standard deviation of up to {seeds:.4f}."
    )
    lines = [
        textwrap.fill(text, 120, break_on_hyphens=False),
        "",
        "| `b2` | moments stored in | held-out loss | difference |",
        "|---|---|---|---|",
    ]
    for part in results.values():
        for row in part["rows"]:
            apart = f"{row['difference']:+.4f} ± {row['standard_error']:.4f}" if row["stored"] != "float32" else ""
            lines.append(f"| {part['b2']} | {row['stored']} | {row['held_out']:.4f} | {apart} |")
    return "\n".join(lines)


def replay(results: dict) -> str:
    """The section on how far a rollout and the training forward are apart, in Markdown."""
    columns = ("nothing", "kept", "selections", "routes", "routes and selections")
    lines = [
        f"| model | {' | '.join(columns)} | selections that differ | routes that differ |",
        f"|---|{'---|' * (len(columns) + 2)}",
    ]
    for name, part in results.items():
        found = {row["replay"]: f"{row['max']:.1e} ({row['mean']:.1e})" for row in part["comparisons"]}
        shares = [
            "" if part[share] is None else f"{part[share]:.2%}" if part[share] else "none"
            for share in ("selections_differ", "routes_differ")
        ]
        lines.append(f"| {' | '.join([name, *(found.get(each, '') for each in columns), *shares])} |")
    cards = sorted({part["circumstances"]["card"] for part in results.values()})
    dates = sorted({part["circumstances"]["date"] for part in results.values()})
    tokens = sorted({part["prompt"] + part["drawn"] for part in results.values()})
    text = (
        f"Largest difference of log-probabilities of the drawn tokens, in brackets the mean; random models, "
        f"{' and '.join(map(str, tokens))} tokens a row, on {' and '.join(cards)}, {' and '.join(dates)}, `python -m "
        "benchmarks.replay`. The last columns count queries, of all layers, whose keys or experts differ where nothing "
        "is replayed."
    )
    return "\n".join([textwrap.fill(text, 120, break_on_hyphens=False), "", *lines])


SECTIONS = {"peers": peers, "forward": forward, "training": training, "sharded": sharded, "plan": plan} | {
    "grouped_product": expert_tables.grouped_product,
    "overlap": overlap,
    "data": data,
    "moments": moments,
    "memory": memory,
    "replay": replay,
    "decode": serving_tables.decode,
    "decode_step": serving_tables.decode_step,
    "cost": serving_tables.cost,
    "engine": serving_tables.engine,
    "batching": serving_tables.batching,
    "acceptance": serving_tables.acceptance,
}
FILES = {  # of benchmarks/results, of the sections whose name is not that of their only file
    "decode": ("decode_attention", "decode_selection"),
    "cost": ("cost_by_position",),
    "memory": ("plan",),
    "engine": ("serving",),
}
DOCUMENTS = dict.fromkeys(SECTIONS, "performance.md") | {  # where each stands in docs/
    "acceptance": "inference.md",
    "data": "data.md",
    "moments": "training.md",
    "plan": "many_devices.md",
    "replay": "post_training_rollouts.md",
    "memory": "many_devices.md",
    "overlap": "many_devices.md",
    "serving": "many_devices.md",
    "needle": "studies.md",
    "nsa": "nsa.md",
}


def _time(row):
    milliseconds = 1e3 * row["seconds"]
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _times(other, row):
    return f"{_time(other)}, {other['seconds'] / row['seconds']:.1f} ×" if other else ""


def _rate(row):
    if "tflops" in row:
        return f"{row['tflops']:.0f} TFLOP/s ({row['share_of_peak']:.0%})"
    return f"{row['tb_per_s']:.2f} TB/s" if "tb_per_s" in row else ""


def _sustained(row):
    return f"{row['tflops_sustained']:.0f} TFLOP/s" if "tflops_sustained" in row else ""


SERVING = ["--serve", "--config", "deepseek_v32", "--gpus", "8"]


def serving() -> str:
    """The plan of serving as the command prints it, but for blanks at the ends of lines."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        planner.serving_main(SERVING)
    lines = (line.rstrip() for line in printed.getvalue().splitlines())
    return "\n".join(["```", f"$ dsa-train plan {' '.join(SERVING)}", *lines, "```"])


def section(name: str) -> str:
    """The section of that name, from what is recorded."""
    if name == "serving":
        return serving()
    if name == "needle":
        return summary.summary(summary.recorded())
    if name == "nsa":
        return nsa_report.summary(nsa_report.recorded())
    files = FILES.get(name, (name,))
    return SECTIONS[name](*(json.loads((RESULTS / f"{file}.json").read_text()) for file in files))


def updated(document: str, name: str, section: str) -> str:
    """The document with the section between the two markers of that name replaced."""
    begin, end = f"<!-- {name} figures: begin -->", f"<!-- {name} figures: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise ValueError(f"docs/{DOCUMENTS[name]} must hold {begin} … {end} once")
    return pattern.sub(lambda _: f"{begin}\n{section}\n{end}", document)


def main() -> None:
    """Rewrites the documents in place."""
    for name, document in DOCUMENTS.items():
        path = DOCS / document
        path.write_text(updated(path.read_text(), name, section(name)))


if __name__ == "__main__":
    main()
