"""Draw docs/accuracy_vs_parameters.png: published networks (published.csv) and this project's recorded runs.

    python docs/accuracy_vs_parameters.py
"""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parent
OURS = {
    "recipe report": "report-seed0",
    "fast, 2.5 epochs": "fast/epochs2.5-seed0",
    "fast, 48 epochs": "fast/epochs48-seed0",
    "best": "best/taught-gated-seed0",
}
# whose names stand on the left of their points, for want of space
LEFT = {"LEMONADE", "Restricted_CNN", "Tiniest", "the report", "recipe report", "best"}


def main() -> None:
    with open(DOCS / "published.csv", newline="", encoding="utf-8") as file:
        published = [(int(row["parameters"]), float(row["accuracy"]), row["name"]) for row in csv.DictReader(file)]
    results = {name: json.loads((DOCS / run / "result.json").read_text()) for name, run in OURS.items()}
    ours = [(result["parameters"], result["accuracy"], name) for name, result in results.items()]

    fig, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for points, colour, marker, label in ((published, "tab:gray", "o", "published"), (ours, "tab:red", "*", "here")):
        axes.plot(*zip(*[point[:2] for point in points]), marker, color=colour, label=label,
                  markersize=10 if marker == "*" else 6)
        for parameters, accuracy, name in points:
            left = name in LEFT
            axes.annotate(name, (parameters, accuracy), xytext=(-7 if left else 7, -3), textcoords="offset points",
                          ha="right" if left else "left", fontsize=8, color=colour)
    axes.axvline(50_000, color="black", linewidth=0.8, linestyle=":")
    axes.text(50_000, 79.7, " the limit of 50,000", fontsize=8)
    axes.set(xscale="log", xlabel="parameters", ylabel="CIFAR-10 test accuracy (%)",
             xlim=(9_000, 500_000), ylim=(79.5, 95.5))
    ticks = [10_000, 20_000, 50_000, 100_000, 200_000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    fig.savefig(DOCS / "accuracy_vs_parameters.png", dpi=120)


if __name__ == "__main__":
    main()
