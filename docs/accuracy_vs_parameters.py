"""Draw docs/accuracy_vs_parameters.png: networks of others (published.csv) and this project's runs (results.csv).

    python docs/accuracy_vs_parameters.py
"""

import csv
import statistics
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
# labels by id in results.csv
OURS = {
    "report": "recipe report", "fast": "recipe fast", "student": "recipe best, with teachers",
    "best": "recipe best", "best-60-28k": "", "best-60-12k": "", "best-60-4k": "recipe best, fewer channels",
}
# whose names stand to the left of their points
LEFT = {"LEMONADE", "TinyVision", "Restricted_CNN", "Tiniest", "the report", OURS["report"], OURS["fast"],
        OURS["student"], OURS["best"]}


def read(name: str) -> list[dict]:
    with open(DOCS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(out: Path = DOCS / "accuracy_vs_parameters.png") -> None:
    others = [(int(row["parameters"]), float(row["accuracy"]), row["name"]) for row in read("published.csv")]
    ours = []
    for id, label in OURS.items():
        runs = [row for row in read("results.csv") if row["id"] == id]
        ours.append((int(runs[0]["parameters"]), statistics.mean(float(run["accuracy"]) for run in runs), label))
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for points, colour, marker, size, label in (
        (others, "tab:gray", "o", 6, "others"), (ours, "tab:red", "*", 10, "this project")
    ):
        axes.plot(*zip(*[point[:2] for point in points], strict=True), marker, color=colour, label=label,
                  markersize=size)
        for parameters, accuracy, name in points:
            left = name in LEFT
            dy = -12 if name in {"recipe fast", "LEMONADE"} else -3  # clear of their neighbours
            axes.annotate(name, (parameters, accuracy), xytext=(-7 if left else 7, dy), textcoords="offset points",
                          ha="right" if left else "left", fontsize=8, color=colour)
    line = list(OURS).index("best")  # the first of the networks of one recipe
    axes.plot(*zip(*[point[:2] for point in ours[line:]], strict=True), color="tab:red", linewidth=0.8)
    axes.axvline(50_000, color="black", linewidth=0.8, linestyle=":")
    axes.text(50_000, 79.7, " the limit of 50,000", fontsize=8)
    axes.set(xscale="log", xlabel="parameters", ylabel="CIFAR-10 test accuracy (%)",
             xlim=(3_500, 500_000), ylim=(79.5, 95.5))
    ticks = [5_000, 10_000, 20_000, 50_000, 100_000, 200_000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
