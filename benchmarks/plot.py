"""Draw the figures of docs/performance.md and docs/predictor.md from the files in data/.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def regrets() -> None:
    """What each way to predict loses on what was left out: a panel for each kind of group."""
    scores = json.loads((ROOT / "data/simulated/predictor.json").read_text())["scores"]
    overall = [score for score in scores if score["ranks"] is None]
    groups = list(dict.fromkeys(one["held_out"] for one in overall))
    methods = list(dict.fromkeys(one["method"] for one in overall))[::-1]
    figure, axes = plt.subplots(1, len(groups), figsize=(11, 2.9), sharey=True, sharex=True)
    for axis, group in zip(axes, groups, strict=True):
        found = {one["method"]: one["regret"] for one in overall if one["held_out"] == group}
        for at, method in enumerate(methods):
            if method not in found:
                axis.text(
                    0.03, at, "no answer", va="center", fontsize=7, color="#8c8c8c",
                    transform=axis.get_yaxis_transform(),
                )  # fmt: skip
                continue
            losses = {name: found[method][name] * 100 for name in ("mean", "p95", "max")}
            shade = COLOURS["KVR"] if method == "corrected" else "#8c8c8c"
            axis.plot([losses["mean"], losses["max"]], [at, at], color=shade, linewidth=1)
            for name, marker in (("mean", "o"), ("p95", "|"), ("max", ">")):
                axis.plot(losses[name], at, marker, color=shade, markersize=5)
        axis.set_title(f"left out: a {group}", fontsize=9)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(methods)), methods, fontsize=8)
    axes[len(groups) // 2].set_xlabel(
        "regret in %: mean (dot), 95th percentile (bar), largest (arrow)", fontsize=8
    )
    save(figure, "simulated-predictor")


def regrets_by_ranks() -> None:
    """Mean and largest regret on contexts left out, by rank count."""
    scores = json.loads((ROOT / "data/simulated/predictor.json").read_text())["scores"]
    figure, axes = plt.subplots(figsize=(5.2, 2.9))
    for method, shade in (("interpolation", "#c0504d"), ("cost-model", "#d99a3c"), ("corrected", COLOURS["KVR"])):
        found = [
            score for score in scores
            if score["method"] == method and score["held_out"] == "context" and score["ranks"] is not None
        ]  # fmt: skip
        ranks = [one["ranks"] for one in found]
        axes.plot(
            ranks, [one["regret"]["mean"] * 100 for one in found], "o-", color=shade, label=f"{method}, mean"
        )
        axes.plot(ranks, [one["regret"]["max"] * 100 for one in found], ":", color=shade, label="largest")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("ranks", fontsize=8)
    axes.set_ylabel("regret in %, contexts left out", fontsize=8)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "simulated-predictor-by-ranks")


def against_search(
    name: str, *files: tuple[str, str], methods: Sequence[str] = ("KVR-P", "interpolated", "KVR-E")
) -> None:
    """TTFT over that of the searched split, compared turn by turn, with intervals; files by what they are of."""
    cases = [
        (f"{what}{held_out['context']:,} tokens", held_out["methods"])
        for what, file in files
        for held_out in json.loads((ROOT / "data" / file).read_text())["held_out"]
    ]
    figure, axes = plt.subplots(figsize=(max(5.2, 1.9 * len(cases)), 2.9))
    shades = {"KVR-P": COLOURS["KVR"], "steps met": "#6a9f58", "interpolated": "#d99a3c", "KVR-E": "#8c8c8c"}
    for shift, method in enumerate(methods):
        for at, (_, found) in enumerate(cases):
            over = {key: value * 100 for key, value in found[method]["over_searched"].items()}
            axes.errorbar(
                at + 0.18 * (shift - (len(methods) - 1) / 2), over["median"],
                yerr=[[over["median"] - over["low"]], [over["high"] - over["median"]]],
                fmt="o", color=shades[method], capsize=2, markersize=4, label=method if at == 0 else None,
            )  # fmt: skip
    axes.axhline(0, color="#8c8c8c", linewidth=0.6)
    axes.set_xticks(range(len(cases)), [what for what, _ in cases], fontsize=8)
    axes.set_ylabel("TTFT over KVR-S, %", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, name)


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
    compared("h100-sxm/llama-7b", "cuda-2-ranks", "Two H100s over NVLink")
    compared("h100-sxm/falcon-7b", "sm-8-ranks", "Falcon 7B, H100, 8 ranks")
    compared("h100-sxm/llama-3.1-8b", "sm-4-ranks", "Llama 3.1 8B, H100, 4 ranks")
    compared("h200/llama-7b", "sm-8-ranks", "H200, 8 ranks")
    compared("epyc-2-cores/quickstart-llama", "cpu-2-ranks", "2 CPU ranks")
    cold_starts()
    regrets()
    regrets_by_ranks()
    against_search(
        "epyc-2-cores-quickstart-llama-predict", ("", "epyc-2-cores/quickstart-llama/predict-cpu-2.json")
    )
    against_search(
        "h100-sxm-predict",
        ("Llama 7B, 8 ranks\n", "h100-sxm/llama-7b/profiled-sm-8.json"),
        ("Falcon 7B, 4 ranks\n", "h100-sxm/falcon-7b/profiled-sm-4.json"),
        methods=("KVR-P", "steps met", "interpolated", "KVR-E"),
    )


if __name__ == "__main__":
    main()
