"""Draws docs/method.svg, the picture of the method in the README: python docs/draw_method.py"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

matplotlib.rcParams["svg.hashsalt"] = "mixedquant"
matplotlib.rcParams["font.size"] = 11
BLUES = ["#08519c", "#3182bd", "#6baed6", "#9ecae1"]
SALIENT, PLAIN = "#d95f02", "#969696"
GROUP, NUM_SALIENT = 7, 3


def box(ax, x, y, width, text, color):
    patch = FancyBboxPatch(
        (x, y), width, 1.5, boxstyle="round,pad=0.12", facecolor="white", edgecolor=color, lw=1.8
    )
    ax.add_patch(patch)
    ax.text(x + width / 2, y + 0.75, text, ha="center", va="center")


def arrow(ax, start, end, color="#444444"):
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, lw=1.4, color=color)
    )


def bars(ax, x, y, heights, colors):
    for i, (height, color) in enumerate(zip(heights, colors, strict=True)):
        ax.bar(x + 0.26 * i, height, width=0.2, bottom=y, color=color)


def main() -> None:
    rng = np.random.default_rng(3)
    k = 4 * GROUP + NUM_SALIENT
    heights = np.sort(0.25 + 0.9 * rng.gamma(1.2, 0.55, k))[::-1]
    heights[:NUM_SALIENT] = [3.0, 2.5, 2.2]
    heights[NUM_SALIENT:] = np.minimum(heights[NUM_SALIENT:], 1.5)
    colors = [SALIENT] * NUM_SALIENT + [BLUES[i // GROUP] for i in range(4 * GROUP)]
    mixed = rng.permutation(k)
    order = [*range(NUM_SALIENT, k), *range(NUM_SALIENT)]

    fig, ax = plt.subplots(figsize=(11.5, 3.9))
    bars(ax, 0, 2, heights[mixed], [SALIENT if i < NUM_SALIENT else PLAIN for i in mixed])
    ax.text(4, 1.75, "input channels of x and W\nas the model has them", ha="center", va="top")
    arrow(ax, (8.5, 2.9), (11.1, 2.9))
    ax.text(9.8, 3.1, "one calibrated\npermutation", ha="center", va="bottom")
    bars(ax, 11.6, 2, heights[order], [colors[i] for i in order])
    for j in range(4):
        ax.text(11.6 + 0.26 * (GROUP * j + 3), 1.75, f"{j + 1}", ha="center", va="top")
    ax.text(18.5, 5.0, "salient", ha="right", va="center", color=SALIENT)
    ax.text(15.2, 1.2, "groups of like magnitudes,\na scale for each", ha="center", va="top")

    arrow(ax, (20.1, 2.9), (21.6, 3.9), BLUES[0])
    arrow(ax, (20.1, 2.5), (21.6, 1.4), SALIENT)
    box(ax, 21.9, 3.3, 6.4, "INT4 × INT4\nexact integer sums × scales", BLUES[0])
    box(ax, 21.9, 0.6, 6.4, "16-bit × 16-bit\nsums in fp32", SALIENT)
    arrow(ax, (28.5, 3.9), (30.3, 3.0), BLUES[0])
    arrow(ax, (28.5, 1.4), (30.3, 2.4), SALIENT)
    ax.text(31, 2.7, "+   y", ha="center", va="center", fontsize=17)
    ax.set_xlim(-0.4, 32)
    ax.set_ylim(0, 5.4)
    ax.axis("off")
    fig.tight_layout(pad=0.2)
    target = Path(__file__).with_name("method.svg")
    fig.savefig(target, metadata={"Date": None})
    print(target)


if __name__ == "__main__":
    main()
