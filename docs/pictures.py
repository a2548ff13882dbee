"""The pictures of the documentation, from what `dfrot inspect` measured.

dfrot inspect smollm2-135m --text pydoc --rotations none RO RH rangerot -o DIR
python docs/pictures.py DIR
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from dfrot.inspect.inspection import read_inspection

plt.switch_backend("Agg")
plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "dfrot", "font.size": 9, "axes.axisbelow": True})

HERE = Path(__file__).parent / "pictures"
TITLES = {
    "none": "as it is",
    "RO": "random orthogonal (RO)",
    "RH": "randomized Hadamard (RH)",
    "rangerot": "refined (rangerot)",
}
COLOURS = {"none": "#b33a3a", "RO": "#8a6d3b", "RH": "#2f6f9f", "rangerot": "#1a8a6a"}


def save(figure: Any, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def channels(surfaces: dict[str, np.ndarray]) -> None:
    """The largest magnitude of every channel at one norm, before and after rotations."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    for axis, name in zip(axes, ("none", "RH", "rangerot"), strict=True):
        peaks = surfaces[name].max(0)
        axis.stairs(peaks, fill=True, color=COLOURS[name])
        axis.set(title=TITLES[name], xlabel="channel", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("largest |x| of 64 tokens")
    save(figure, "channels.svg")


def levels(surfaces: dict[str, np.ndarray]) -> None:
    """One ordinary token's magnitudes, and the levels that 4 bits give it."""
    ordinary = np.argsort(surfaces["none"].max(1))[surfaces["none"].shape[0] // 2]
    figure, axes = plt.subplots(2, 1, figsize=(9, 2.8), sharex=True)
    for axis, name in zip(axes, ("none", "rangerot"), strict=True):
        values = surfaces[name][ordinary]
        step = values.max() / 7  # a symmetric grid of 4 bits has the levels −7 … 7
        axis.plot(values, np.zeros_like(values), "|", color=COLOURS[name], markersize=22, alpha=0.5)
        for level in range(8):
            axis.axvline(level * step, color="#444", linewidth=0.8, linestyle=":")
        lost = (np.round(values / step) == 0).mean()
        axis.set(yticks=[], xlim=(0, surfaces["none"][ordinary].max() * 1.02))
        axis.set_title(
            f"{TITLES[name]}: {100 * lost:.0f} % of {values.size} channels are rounded to 0", loc="left", fontsize=9
        )
    axes[-1].set_xlabel("|x| of one token; dotted: the levels of a symmetric 4-bit grid")
    figure.tight_layout()
    save(figure, "levels.svg")


def errors(errors: dict[str, np.ndarray], massive: np.ndarray) -> None:
    """Relative error of ordinary and of massive tokens, by rotation."""
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    for place, name in enumerate(TITLES):
        for offset, chosen, alpha in ((-0.18, ~massive, 0.5), (0.18, massive, 1.0)):
            value = float(errors[name][chosen].mean())
            axis.bar(place + offset, value, width=0.34, color=COLOURS[name], alpha=alpha)
            axis.text(place + offset, value, f"{value:.3f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(TITLES)), [title.replace(" (", "\n(") for title in TITLES.values()], fontsize=8)
    axis.set_ylabel("relative error, 4 bits")
    axis.set_title("pale: ordinary tokens; full: massive tokens", fontsize=9, loc="left")
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.15)
    save(figure, "massive.svg")


def sites() -> None:
    """Where a decoder block is rotated."""
    figure, axis = plt.subplots(figsize=(9, 3.4))
    axis.set(xlim=(0, 100), ylim=(0, 42))
    axis.axis("off")

    def box(x: float, y: float, text: str, colour: str = "#eef3f6", width: float = 10, height: float = 5) -> None:
        axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="#456", linewidth=0.8))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)

    def arrow(x0: float, y0: float, x1: float, y1: float) -> None:
        axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": "#456", "linewidth": 0.9})

    online, folded = "#f7d9b0", "#cfe8dc"
    axis.plot([2, 98], [4, 4], color="#1a8a6a", linewidth=3)
    axis.text(2, 0.2, "residual stream, rotated by R1 (folded into every matrix that reads or writes it)", fontsize=8)
    box(5, 10, "norm")
    box(5, 20, "q, k, v_proj")
    box(20, 30, "queries, keys\nafter RoPE: R3", online, 14, 7)
    box(20, 18, "values: R2", folded, 14)
    box(40, 24, "attention", width=11)
    box(54, 24, "o_proj: R2ᵀ", folded, 11)
    for points in ((10, 4, 10, 10), (10, 15, 10, 20), (15, 23, 20, 32), (15, 22, 20, 20.5), (34, 33, 40, 28)):
        arrow(*points)
    arrow(34, 20.5, 40, 25)
    arrow(51, 26.5, 54, 26.5)
    arrow(59.5, 24, 59.5, 4.5)
    box(67, 10, "norm")
    box(67, 20, "gate, up_proj", width=11)
    box(79, 20, "SiLU, ×", width=9)
    box(79, 30, "R4", online, 9)
    box(90, 24, "down_proj", width=9.5)
    for ends in ((72, 4, 72, 10), (72, 15, 72, 20), (78, 22.5, 79, 22.5), (83.5, 25, 83.5, 30), (88, 32.5, 93, 29)):
        arrow(*ends)
    arrow(94.5, 24, 94.5, 4.5)
    box(5, 38, "folded: costs nothing", folded, 20, 3.5)
    box(28, 38, "online: while it runs", online, 20, 3.5)
    save(figure, "sites.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inspection", type=Path, help="what dfrot inspect wrote")
    found = read_inspection(parser.parse_args().inspection)
    if found is None:
        parser.error("there is no inspection in that directory")
    HERE.mkdir(exist_ok=True)
    surfaces = {name: np.asarray(surface, np.float64) for name, surface in found.surfaces.items()}
    channels(surfaces)
    levels(surfaces)
    errors({name: np.asarray(error) for name, error in found.errors.items()}, found.is_massive)
    sites()


if __name__ == "__main__":
    main()
