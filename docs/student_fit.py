"""Measure how well students fit the mean of their teachers on training images: docs/student_fit.csv.

    python docs/student_fit.py

For the first 4,000 training images, as they are and augmented, it writes the accuracy of the teachers' mean and of a
student, the Kullback-Leibler divergence from that mean to the student in nats, and how often both predict the same
class. Calibration is undone first, since the students were calibrated after they had learned from the teachers. The
folder with CIFAR-10 is data, or $CIFAR10_DIR.
"""

import csv
import fnmatch
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from data import DEFAULT_DATA_DIR, autoaugment, flip_and_rotate, load_split
from eval import accuracy_and_loss, infer
from model import load_weights

CALIBRATE = 0.73  # of all students
TEACHERS = {"student-160ep-seed0": "best-40ep-seed?", "student-160ep-seed1": "best-40ep-seed?",
            "student-80ep-seed0": "best-?0ep-seed?",
            "student-80ep-seed1": "best-?0ep-seed?"}  # of each student, in runs


def main(data_dir: str | Path = DEFAULT_DATA_DIR, out: Path = DOCS / "student_fit.csv", n: int = 4000) -> None:
    train = load_split(data_dir, "train")
    images, labels = train.images[:n], train.labels[:n]
    versions = {
        "as it is": images,
        "AutoAugment": autoaugment(images, seed=0, group_size=16),
        "flipped, rotated, AutoAugment": autoaugment(flip_and_rotate(images, seed=0), seed=1, group_size=16),
    }
    networks = {path.parent.name: load_weights(path)[0] for path in (DOCS / "runs").glob("*ep-seed?/weights.pkl")}
    rows = []
    for version, augmented in versions.items():
        log_probabilities_of = {name: infer(network, augmented) for name, network in networks.items()}
        for name, pattern in TEACHERS.items():
            teachers = sorted(fnmatch.filter(networks, pattern))
            mean = torch.stack([log_probabilities_of[teacher] for teacher in teachers]).exp().mean(dim=0)
            log_probabilities = (CALIBRATE * log_probabilities_of[name]).log_softmax(dim=1)
            divergence = F.kl_div(log_probabilities, mean, reduction="batchmean").item()
            percent = [accuracy_and_loss(scores, target)[0] for scores, target in (
                (mean.log(), labels), (log_probabilities, labels), (log_probabilities, mean.argmax(dim=1)))]
            rows.append({"version": version, "student": name, "teachers_accuracy": f"{percent[0]:.2f}",
                         "student_accuracy": f"{percent[1]:.2f}", "same_class": f"{percent[2]:.2f}",
                         "divergence": f"{divergence:.4f}"})
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
