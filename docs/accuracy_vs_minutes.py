"""Draw docs/accuracy_vs_minutes.png: the accuracy of this project's trainings (results.csv) for the time they take.

    python docs/accuracy_vs_minutes.py
"""

import csv
import statistics
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
COMMANDS = {  # labels of rows without teachers by their ids
    "quick": "--recipe quick", "fast": "python train.py", "fast-8": "--epochs 8 (float32)",
    "best-40": "40 epochs of best (one core, mostly C++ kernels)",
}


def main(out: Path = DOCS / "accuracy_vs_minutes.png") -> None:
    with open(DOCS / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    points = []
    for id, label in COMMANDS.items():
        runs = [row for row in rows if row["id"] == id and row["device"] == "cpu"]
        accuracies = [float(run["accuracy"]) for run in runs]
        minutes = [float(run["seconds"]) / 60 for run in runs]
        points.append((statistics.mean(minutes), statistics.mean(accuracies)))
        axes.plot(minutes, accuracies, ".", color="tab:red", alpha=0.4)
        axes.annotate(label, points[-1], xytext=(8, -10) if id != "best-40" else (8, 8), textcoords="offset points",
                      ha="left" if id != "best-40" else "right", fontsize=8)
    axes.plot(*zip(*points, strict=True), "o", color="tab:red")
    axes.set(xscale="log", xlabel="minutes on a CPU, on two cores unless the label says otherwise",
             ylabel="CIFAR-10 test accuracy (%)", xlim=(0.5, 1000), ylim=(78, 96))
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
