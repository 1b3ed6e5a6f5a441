"""Draw the figures of docs/performance.md from the files in data/.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"single": "#8c8c8c", "tsp": "#c0504d", "zigzag": "#d99a3c", "KVR": "#3b6fb6", "TTFT(p)": "#9fbfdf"}


def colour(method: str) -> str:
    """One for each family of methods."""
    return next((value for prefix, value in COLOURS.items() if method.startswith(prefix)), "#5a9367")


def bars(axes: Any, methods: list[dict[str, Any]], title: str) -> None:
    """TTFT of each method, its interval, and its speed-up over TSP."""
    done = [method for method in methods if method["ttft_s"] is not None][::-1]
    for at, method in enumerate(done):
        milliseconds = method["ttft_s"] * 1e3
        low, high = (bound * 1e3 for bound in method["interval_s"])
        axes.barh(
            at,
            milliseconds,
            xerr=[[milliseconds - low], [high - milliseconds]],
            color=colour(method["method"]),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        over = method["speedup_over_tsp"]
        axes.text(
            high + 8, at, f"{milliseconds:.0f}" + (f"  ({over:.2f}×)" if over else ""), va="center", fontsize=8
        )
    axes.set_yticks(range(len(done)), [method["method"] for method in done], fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("TTFT in ms; over TSP as published in brackets", fontsize=8)
    axes.set_xlim(0, max(method["ttft_s"] for method in done) * 1e3 * 1.3)
    axes.spines[["top", "right"]].set_visible(False)


def compared(folder: str, part: str, title: str) -> None:
    """All methods of one part; those of links held to a bandwidth beside them."""
    file = ROOT / "data" / folder / f"{part}.json"
    figures = json.loads(file.read_text())["figures"]
    shown = [(figures["full_bandwidth"]["methods"], f"{title}, links as they are")]
    if "held" in figures:
        shown.append((figures["held"]["methods"], f"{title}, links held to {figures['held']['bandwidth']}"))
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 2.9), squeeze=False)
    for one, (methods, name) in zip(axes[0], shown, strict=True):
        bars(one, methods, name)
    save(figure, f"{folder.replace('/', '-')}-{part}")


def cold_starts() -> None:
    """Cold over warm."""
    figures = json.loads((ROOT / "data/h100-sxm/llama-7b/cold.json").read_text())["figures"]
    figure, axes = plt.subplots(figsize=(5.2, 2.9))
    rows = [*figures["contexts"].items(), *figures["chunks"].items()][::-1]
    axes.barh(range(len(rows)), [(one["ratio"] - 1) * 100 for _, one in rows], color=COLOURS["KVR"])
    axes.axvline(5, color="#c0504d", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_xlabel("first prefill of a shape never seen, % over a warm one", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "h100-sxm-llama-7b-cold")


def save(figure: Any, name: str) -> None:
    """As SVG, text as text, the same bytes for the same data."""
    folder = ROOT / "docs" / "plots"
    folder.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw all of them."""
    mpl.use("agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvr-partition", "font.family": "sans-serif"})
    for ranks in (2, 4, 8):
        compared("h100-sxm/llama-7b", f"sm-{ranks}-ranks", f"H100, {ranks} ranks")
    compared("h200/llama-7b", "sm-8-ranks", "H200, 8 ranks")
    compared("epyc-2-cores/quickstart-llama", "cpu-2-ranks", "2 CPU ranks")
    cold_starts()


if __name__ == "__main__":
    main()
