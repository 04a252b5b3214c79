"""The chart of benchmarks/RESULTS.md: how much of the peak a training step reaches.

python -m fastllm.bench --json > bench.json
python benchmarks/chart.py bench.json docs/fraction-of-peak.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from fastllm.benchmarking.shapes import CONFIGS

STYLES = {"fastllm": "#1f6feb", "compile": "#8c959f", "tuned": "#afb8c1", "eager": "#d0d7de"}


def main(source: Path, target: Path) -> None:
    results = json.loads(source.read_text())["configs"]
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    width = 0.8 / len(STYLES)
    for i, (name, color) in enumerate(STYLES.items()):
        for x, result in enumerate(results):
            ratio = 1 if name == "fastllm" else result["ratio"][name]
            if ratio is None:
                continue
            percent = 100 * result["fraction_of_peak"] / ratio
            label = name if x == 0 else None
            bars = axes.bar(x + (i - 1.5) * width, percent, width, color=color, label=label)
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
    labels = []
    for result in results:
        H, L, _, S, B, *_ = CONFIGS[result["config"]]
        labels.append(f"{result['config']}\n{L} x {H}, {B} x {S}")
    axes.set_xticks(range(len(results)), labels)
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of FMA peak")
    axes.set_title("A training step in fp32 (layers x width, batch x length)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(STYLES), loc="upper left", fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
