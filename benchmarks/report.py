"""Tables and roofline figures for docs/, from the JSON files of linear.py, card.py, card_model.py.

    cd docs && python ../benchmarks/report.py benchmark_peers.{json,png} > benchmark_peers.md
    cd docs && python ../benchmarks/report.py benchmark_cuda_model.json > benchmark_cuda_model.md

Prints Markdown. The figure shows speed against multiply-accumulates per byte of weights, for the
first shape; lines mark the measured limits of the chip.
"""

import itertools
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours are distinct for colour-blind readers; markers are for print
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#999999"]
MARKERS = "osv^DPX*"


def header(record: dict) -> str:
    return f"{record['chip']}; torch {record['torch']}; {record['date']}"


MODEL_HEAD = [
    "| contender | weights MiB | peak MiB | phase | tokens/s | x bf16 |",
    "|---|---|---|---|---|---|",
]


def model_line(row: dict) -> str:
    sizes = (
        "-" if size is None else f"{size / 2**20:.0f}"
        for size in (row["weight_bytes"], row["peak_bytes"])
    )
    speed = f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else row["failed"]
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    return f"| {' | '.join((row['contender'], *sizes, row['phase'], speed, ratio))} |"


def model_table(record: dict) -> str:
    """The Markdown table for a file of card_model.py."""
    arguments = record["arguments"]
    lines = [
        f"{header(record)}. {arguments['layers']} layers of {arguments['hidden']} channels; "
        f"prompt of {arguments['prompt']} tokens, batch of {arguments['batch']}."
    ]
    lines += ["", *MODEL_HEAD, *map(model_line, record["rows"])]
    return "\n".join(lines)


def tables(record: dict) -> str:
    """The Markdown tables for a file of linear.py or card.py."""
    rows = record["rows"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [header(record)] if "activations" in record else []
    baseline = record.get("baseline", "torch fp32")
    for threads in dict.fromkeys(row.get("threads") for row in rows):  # None in a card's rows
        prefix = f"Threads: {threads}. " if threads else ""
        lines += ["", f"{prefix}Milliseconds of {baseline}, then times its speed.", ""]
        lines.append("| K x N | M | " + " | ".join(names) + " |")
        lines.append("|" + "---|" * (2 + len(names)))
        same_threads = [row for row in rows if row.get("threads") == threads]
        for (k, n, m), group in itertools.groupby(
            same_threads, key=lambda row: (row["k"], row["n"], row["m"])
        ):
            by_name = {row["contender"]: row for row in group}
            cells = [
                "-"
                if name not in by_name
                else f"{by_name[name]['milliseconds']:.{2 if threads else 4}f} ms"
                if name == baseline
                else f"{by_name[name]['ratio']:.2f}"
                for name in names
            ]
            lines.append(f"| {k} x {n} | {m} | " + " | ".join(cells) + " |")
    if "quantizer" in record:
        lines += ["", "| quantizer | g | Hadamard | format | threads | GB/s |"]
        lines.append("|---|---|---|---|---|---|")
        for row in record["quantizer"]:
            speed = f"{row['gigabytes_per_second']:.1f}"
            lines.append(f"| {row['choice']} | {row['threads']} | {speed} |")
    if "activations" in record:
        lines += ["", "| K | M | quantizer of activations | us | GB/s | of a copy |"]
        lines.append("|---|---|---|---|---|---|")
        for row in record["activations"]:
            speed = f"{row['microseconds']:.1f} | {row['gigabytes_per_second']:.0f}"
            fields = (row["k"], row["m"], row["choice"], speed, f"{row['of_copy']:.0%}")
            lines.append(f"| {' | '.join(map(str, fields))} |")
    return "\n".join(lines)


def roofline(record: dict, path: str) -> None:
    """Draw the roofline figure, with a panel for each number of threads."""
    rows = record["rows"]
    k, n = rows[0]["k"], rows[0]["n"]
    rows = [row for row in rows if (row["k"], row["n"]) == (k, n)]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    limits = record["limits"]
    figure, panels = plt.subplots(
        1, len(limits), figsize=(6 * len(limits), 5), sharey=True, squeeze=False
    )
    for panel, (threads, peaks) in zip(panels[0], limits.items(), strict=True):
        memory = peaks["memory"]
        arithmetic = {name: value for name, value in peaks.items() if name != "memory"}
        highest = max(arithmetic.values())
        right = max(3e3, *(row["m"] * k * n / row["weight_bytes"] for row in rows))
        panel.plot([0.1, highest / memory], [0.1 * memory, highest], color="0.6", lw=1)
        panel.annotate(
            f"memory {memory:.0f} GB/s",
            (0.3, 0.3 * memory * 1.15),
            color="0.4",
            rotation=35,
            fontsize=8,
        )
        for index, (name, value) in enumerate(arithmetic.items()):
            panel.plot([value / memory, right], [value, value], color="0.6", lw=1, ls="--")
            at = right / 8 ** (index % 2), value  # alternate, so that neighbours do not overlap
            label = f"{name} {value:.0f}"
            panel.annotate(label, at, color="0.4", fontsize=8, ha="right", va="bottom")
        for index, name in enumerate(names):
            points = [
                (row["m"] * row["k"] * row["n"] / row["weight_bytes"], row["gmacs"])
                for row in rows
                if row["contender"] == name and str(row.get("threads", threads)) == threads
            ]
            style = MARKERS[index % len(MARKERS)], COLOURS[index % len(COLOURS)]
            filled = {} if index < len(MARKERS) else {"mfc": "white"}
            panel.plot(
                *zip(*points, strict=True),
                marker=style[0],
                color=style[1],
                ms=5,
                lw=1,
                label=name,
                **filled,
            )
        panel.set(
            xscale="log",
            yscale="log",
            title=f"{k} x {n}, {threads}" + f" thread{'s' * (threads != '1')}" * threads.isdigit(),
            xlabel="multiply-accumulates per byte of weights",
        )
        panel.grid(alpha=0.2)
    panels[0][0].set_ylabel("1e9 multiply-accumulates per second")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.suptitle(header(record), fontsize=9)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=150)


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        record = json.load(file)
    print(tables(record) if "limits" in record else model_table(record))
    if len(sys.argv) == 3:
        roofline(record, sys.argv[2])


if __name__ == "__main__":
    main()
