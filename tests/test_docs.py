"""The README against the recorded runs, its commands, the figures and the benchmark."""

import csv
import re
import runpy
import shlex
import statistics
import sys

import pytest
from conftest import ROOT

import eval
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str) -> list[dict]:
    with open(ROOT / "docs" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


RESULTS = read("results.csv")


def statistics_of(command: str) -> dict:
    """What the README says of a command: parameters, minutes on a CPU, accuracy, standard deviation, seeds."""
    runs = [row for row in RESULTS if row["command"] == command]
    accuracies = [float(row["accuracy"]) for row in runs]
    seconds = [float(row["seconds"]) for row in runs if row["device"] == "cpu"]
    minutes = statistics.mean(seconds) / 60 if seconds else 0.0
    return {
        "parameters": f"{int(runs[0]['parameters']):,}",
        "minutes": (f"{minutes:.1f}" if minutes < 20 else f"{minutes:.0f}") if seconds else "–",
        "accuracy": f"{statistics.mean(accuracies):.2f}", "seeds": str(len(runs)),
        "deviation": f"{statistics.stdev(accuracies):.2f}" if len(runs) > 1 else None,
    }


# --- numbers --------------------------------------------------------------------------------------

def test_the_table_of_the_readme():
    rows = re.findall(r"^\| `(python .*?)`.*? \| ([\d,]+) \| ([\d.]+|–) \| (.+?) \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) >= 6
    teachers = " ".join(re.findall(r"docs/runs/\S+\.pkl", README))
    for command, parameters, minutes, accuracy, seeds in rows:
        found = statistics_of(command.replace("--teachers A B", f"--teachers {teachers}"))
        accuracy, _, deviation = accuracy.replace("*", "").removesuffix(" %").partition(" ± ")
        assert (parameters, minutes, accuracy, deviation or None, seeds) == (
            found["parameters"], found["minutes"], found["accuracy"], found["deviation"], found["seeds"]), command


def test_every_percentage_in_the_readme_is_recorded():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    numbers = re.findall(r"(\d+\.\d+)\*{0,2} (?:± (\d+\.\d+) )?%", text)
    recorded = {row["accuracy"] for row in RESULTS} | {row["accuracy"] for row in read("published.csv")}
    recorded |= {row["held_out_accuracy"] for row in read("ablations.csv")}
    record = next(row for row in RESULTS if row["id"] == "student")  # seed 0, which is weights.pkl
    low, high = (f"{bound:.2f}" for bound in eval.confidence_interval(float(record["accuracy"]), 10_000))
    assert f"{low} to {high} %" in text
    recorded.add(high)
    summaries = [statistics_of(command) for command in {row["command"] for row in RESULTS}]
    recorded |= {summary["accuracy"] for summary in summaries}
    rounded = {f"{float(number):.1f}" for number in recorded}
    deviations = {summary["deviation"] for summary in summaries}
    assert len(numbers) >= 8
    for number, deviation in numbers:
        assert number in (recorded if len(number) == 5 else rounded), number
        assert not deviation or deviation in deviations, deviation


def test_results_are_those_of_the_logs():
    assert len({row["log"] for row in RESULTS}) == len(RESULTS)
    for row in RESULTS:
        with open(ROOT / row["log"], newline="") as file:
            *_, last = csv.DictReader(file)
        assert f"{float(last['test_accuracy']):.2f}" == row["accuracy"], row["log"]
        assert f"{float(last['test_loss']):.4f}" == row["loss"], row["log"]
        assert float(last["epoch"]) == float(row["epochs"]), row["log"]


def test_the_output_that_the_readme_shows():
    """It was copied from a recorded run."""
    (block,) = re.findall(r"```\n\$ python train.py(.*?)```", README, re.DOTALL)
    with open(ROOT / "docs/runs/fast-2ep-seed0/metrics.csv", newline="") as file:
        for row, line in zip(csv.DictReader(file), re.findall(r"^ +[\d.]+ +\d.*", block, re.MULTILINE), strict=True):
            row = {name: float(value) for name, value in row.items()}
            assert line == train.table_line(row, 2)


# --- commands -------------------------------------------------------------------------------------

COMMANDS = sorted({
    command.strip().replace("--teachers A B", "--teachers weights.pkl weights.pkl")
    for text in (re.sub(r"\\\n\s*", "", README), train.__doc__, eval.__doc__)
    for command in re.findall(r"python ((?:train|eval)\.py[^\n`#&]*?)(?:`|#|&|\n|  )", text)
})


def test_the_commands_are_found():
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_readme_and_help_are_understood(command):
    script, *words = shlex.split(command)
    args = {"train.py": train, "eval.py": eval}[script].make_parser().parse_args(words)
    for name in getattr(args, "teachers", []):
        assert (ROOT / name).exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit.value.code == 0 and "options:" in capsys.readouterr().out


def test_links_of_the_documents():
    for name in ("README.md", "docs/notes.md"):
        folder = (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (folder / link).exists(), f"{name}: {link}"


# --- figures and benchmark ------------------------------------------------------------------------

@pytest.fixture
def load_script(monkeypatch):
    """Load a script that is no test as a module."""
    def load(path: str) -> dict:
        monkeypatch.setattr(sys, "path", [*sys.path])
        return runpy.run_path(str(ROOT / path))
    return load


@pytest.mark.parametrize("script", ["accuracy_vs_parameters.py", "accuracy_vs_minutes.py"])
def test_figures_of_the_results(script, load_script, tmp_path):
    load_script(f"docs/{script}")["main"](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_figure_of_the_augmentation(load_script, dataset, tmp_path):
    load_script("docs/augmentation.py")["main"](str(dataset), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.fixture
def benchmark(python, monkeypatch):
    """tests/benchmark.py as a module, for the small data set."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    import benchmark

    monkeypatch.setattr(benchmark, "PYTHON", python)
    monkeypatch.setattr(benchmark.model, "reuse_freed_memory", lambda: None)
    return benchmark


def test_benchmark(benchmark, dataset, capsys):
    benchmark.main(["--steps-only", "--rounds", "1", "--data-dir", str(dataset)])
    out = capsys.readouterr().out
    for words in ("eval.py:", "train.py --epochs 0.1", "fast, float32", "all steps", "augmentation", "exported"):
        assert words in out


def test_benchmark_of_trainings(benchmark, dataset, tmp_path, capsys):
    benchmark.print_trainings(["--recipe quick", "--recipe fast --seed 1"], str(dataset), tmp_path)
    out = capsys.readouterr().out
    assert "  --recipe quick " in out and "  --recipe fast --seed 1 " in out and out.count(" % in ") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"recipe-quick", "recipe-fast-seed-1"}
