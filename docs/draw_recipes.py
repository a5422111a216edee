"""Draws docs/recipes.svg, the picture in the README: python docs/draw_recipes.py"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "figures" / "full_test" / "smollm2-135m_cells.csv"
GREY = "#808080"  # readable on a white page and on a dark one
COLORS = {"16-bit model": GREY, "best": "#1f77b4", "fast": "#5fa2d4", "rtn": "#d95f02"}
SALIENT = "0.05"


def bars(path):
    """([(label, perplexity)] in the order of COLORS, bits per weight of the quantized ones)."""
    perplexities, bits = {}, set()
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["task"] == "baseline":
                perplexities["16-bit model"] = float(row["result.perplexity"])
            elif row["config.backend"] == "int4" and row["config.salient_prop"] == SALIENT:
                perplexities[row["config.recipe"]] = float(row["result.perplexity"])
                bits.add(row["result.bits_per_weight"])
    (equal,) = bits
    return [(name, perplexities[name]) for name in COLORS], float(equal)


def main():
    rows, bits = bars(CELLS)
    matplotlib.rcParams.update({"svg.hashsalt": "mixedquant", "svg.fonttype": "path"})
    matplotlib.rcParams.update({"font.size": 12, "text.color": GREY})
    figure, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
    labels, values = zip(*rows, strict=True)
    ax.barh(labels, values, color=COLORS.values(), height=0.7)
    for index, value in enumerate(values):
        ax.text(value + 0.4, index, f"{value:.2f}", va="center", color=GREY)
    ax.invert_yaxis()
    ax.set_xlim(0, max(values) * 1.1)
    ax.set_xticks([])
    ax.tick_params(length=0, labelcolor=GREY)
    ax.spines[:].set_visible(False)
    ax.set_title(
        f"Perplexity of SmolLM2-135M on WikiText-2 (lower is better); W4A4 at {bits:.2f} bits",
        loc="left",
        fontsize=12,
    )
    figure.savefig(
        Path(__file__).with_name("recipes.svg"), transparent=True, metadata={"Date": None}
    )


if __name__ == "__main__":
    main()
