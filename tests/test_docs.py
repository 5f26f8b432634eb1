"""The README against the recorded runs, its commands, the figures and the benchmark."""

import csv
import json
import re
import runpy
import shlex
import statistics
import sys

import pytest
import torch
from conftest import ROOT

import eval
import model
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str) -> list[dict]:
    with open(ROOT / "docs" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


RESULTS = read("results.csv")


def accuracies_of(command: str) -> str:
    """How the README writes them: up to three seeds are listed, from five on mean and standard deviation."""
    found = [float(row["accuracy"]) for row in RESULTS if row["command"] == command]
    if len(found) < 5:
        return ", ".join(f"{accuracy:.2f}" for accuracy in found) + " %"
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f} %"


def minutes_of(command: str) -> str:
    minutes = statistics.mean(float(row["seconds"]) for row in RESULTS if row["command"] == command) / 60
    return f"{minutes:.1f}" if minutes < 20 else f"{minutes:.0f}"


# --- numbers --------------------------------------------------------------------------------------

def test_the_table_of_the_readme():
    rows = re.findall(r"^\| `(python train.*?)` \| ([\d,]+) \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    assert len(rows) >= 6
    for command, parameters, accuracy, minutes in rows:
        runs = [row for row in RESULTS if row["command"] == command]
        assert {parameters} == {f"{int(row['parameters']):,}" for row in runs}, command
        assert accuracy.replace("*", "") == accuracies_of(command), command
        assert {row["trained_by"] for row in runs} == {"train.py"}, command
        where = " on a GPU" if {row["device"] for row in runs} == {"cuda"} else ""
        assert minutes == minutes_of(command) + where, command


def ablation() -> dict[str, list[str]]:
    """The columns of each row of the ablation table: accuracies, their mean, the mean loss."""
    recorded = {}
    for row in read("ablation.csv"):  # a row for each epoch: the last one counts
        recorded.setdefault(row["row"], {})[row["seed"]] = (float(row["val_accuracy"]), float(row["val_loss"]))
    table = {}
    for name, runs in recorded.items():
        accuracies, losses = zip(*runs.values(), strict=True)
        table[name] = [", ".join(f"{accuracy:.2f}" for accuracy in accuracies), f"{statistics.mean(accuracies):.2f}",
                       f"{statistics.mean(losses):.4f}"]
    return table


def test_the_ablation_table_of_the_readme():
    rows = re.findall(r"^\| ([^|`]+?) \| ([\d., ]+) \| ([\d.]+) % \| ([\d.]+) \|$", README, re.MULTILINE)
    assert {name: found for name, *found in rows} == ablation() and len(rows) >= 9


@pytest.mark.parametrize("document", ["README.md", "docs/notes.md"])
def test_every_percentage_is_recorded(document):
    text = re.sub(r"```.*?```| ± [\d.]+", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    recorded = {row["accuracy"] for row in RESULTS + read("published.csv")}
    recorded |= {f"{float(row[name]):.2f}" for row in read("trials.csv") + read("ablation.csv")
                 for name in ("held_out_accuracy", "unseen_accuracy", "train_images_accuracy", "val_accuracy")
                 if row.get(name)}
    recorded |= {row[name] for row in read("student_fit.csv") for name in ("teachers_accuracy", "student_accuracy")}
    for run in (ROOT / "docs/runs").iterdir():
        with open(run / "metrics.csv", newline="") as file:
            *_, before, last = [{}, *csv.DictReader(file)]
        recorded.add(f"{float(last['train_accuracy']):.2f}")
        if json.loads((run / "result.json").read_text()).get("averaged_share"):  # the last epoch before the mean
            recorded |= {f"{float(before[name]):.2f}" for name in ("train_accuracy", "test_accuracy")}
    for report in ROOT.glob("docs/runs/*/eval.txt"):
        recorded |= set(re.findall(r"(\d+\.\d+) %", report.read_text()))
    recorded |= {accuracies_of(row["command"]).split()[0].rstrip(",") for row in RESULTS}
    recorded |= {mean for _, mean, _ in ablation().values()}
    rounded = {f"{float(number):.1f}" for number in recorded}
    numbers = set(re.findall(r"(\d+\.\d+)\*{0,2} %", text))
    assert len(numbers) >= 8
    for number in numbers:
        assert number in (recorded if len(number) == 5 else rounded | recorded), number


def test_results_are_those_of_the_logs():
    assert len({row["log"] for row in RESULTS}) == len(RESULTS)
    for row in RESULTS:
        with open(ROOT / row["log"], newline="") as file:
            *_, last = csv.DictReader(file)
        assert f"{float(last['test_accuracy']):.2f}" == row["accuracy"], row["log"]
        assert f"{float(last['test_loss']):.4f}" == row["loss"], row["log"]
        assert float(last["epoch"]) == float(row["epochs"]), row["log"]
        seconds = json.loads((ROOT / row["log"]).with_name("result.json").read_text())["seconds"]
        assert round(seconds) == int(row["seconds"]), row["log"]


def test_the_output_that_the_readme_shows():
    """It was copied from a recorded run."""
    (block,) = re.findall(r"```\n(recipe fast.*?)```", README, re.DOTALL)
    with open(ROOT / "docs/runs/fast-2ep-seed0/metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    lines = re.findall(r"^ +[\d.]+  .*", block, re.MULTILINE)
    assert [line[:72] for line in lines] == [train.table_line(row, "test")[:72] for row in rows]  # less the time left
    seconds = json.loads((ROOT / "docs/runs/fast-2ep-seed0/result.json").read_text())["seconds"]
    assert f"{seconds / 60:.1f} minutes; the weights are in runs/fast-2ep-seed0/weights.pkl and" in block


@pytest.fixture
def load_script(monkeypatch):
    """Load a script that is no test as a module."""
    def load(path: str) -> dict:
        monkeypatch.setattr(sys, "path", [*sys.path])
        return runpy.run_path(str(ROOT / path))
    return load


# --- commands -------------------------------------------------------------------------------------

COMMANDS = sorted({
    command.strip().replace("--teachers A B", "--teachers weights.pkl weights.pkl")
    for text in (README, train.__doc__, eval.__doc__)
    for command in re.findall(r"python ((?:train|eval)\.py[^\n`#&]*?)(?:`|#|&|\n|  )", text)
})


def test_the_commands_are_found():
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_readme_and_help_are_understood(command):
    script, *words = shlex.split(command)
    parser = {"train.py": train, "eval.py": eval}[script].make_parser()
    if words == ["--help"]:
        return  # see test_help
    args = parser.parse_args(words)
    for name in getattr(args, "teachers", []):
        assert list(ROOT.glob(str(name)))


def test_the_readmes_network_of_ones_own(dataset, tmp_path, monkeypatch):
    """Pasted at the end of model.py it trains by the README's command; it is also the network "plain"."""
    (code,) = re.findall(r"```python\n(class.*?)```", README, re.DOTALL)
    monkeypatch.setattr(model, "NETWORKS", {**model.NETWORKS})
    exec(code, vars(model))  # noqa: S102
    command = "train.py --network mine"
    assert f"`python {command}`" in README
    monkeypatch.chdir(tmp_path)
    assert train.main([*command.split()[1:], "--epochs", "0.1", "--data-dir", str(dataset)]) == 0
    mine, plain = (model.build_network(name).state_dict().items() for name in ("mine", "plain"))
    assert [(name, tensor.shape) for name, tensor in mine] == [(name, tensor.shape) for name, tensor in plain]


@pytest.mark.parametrize("script", ["train.py", "eval.py", "docs/ablation.py"])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(model, "NETWORKS", {**model.NETWORKS})
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit.value.code == 0 and "options:" in capsys.readouterr().out


def test_links_of_the_documents():
    for name in ("README.md", "docs/notes.md"):
        folder = (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (folder / link).exists(), f"{name}: {link}"


@pytest.mark.parametrize("network", ["no-flips", "no-gates"])
def test_the_networks_of_the_ablation_table(network, load_script, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "NETWORKS", {**model.NETWORKS})
    load_script("docs/ablation.py")
    assert 47_000 < model.count_parameters(model.build_network(network)) <= 50_000
    torch.manual_seed(0)
    built, images = model.build_network(network).eval(), torch.randn(4, 3, 32, 32)
    for parameter in built.parameters():
        if not parameter.any():  # a block starts as the identity
            torch.nn.init.normal_(parameter, std=0.1)
    assert torch.allclose(built(images), built(images.flip(3)), atol=1e-4) == (network == "no-gates")


# --- figures and benchmark ------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["accuracy_vs_parameters.py", "accuracy_vs_minutes.py"])
def test_figures_of_the_results(script, load_script, tmp_path):
    load_script(f"docs/{script}")["main"](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_figure_of_the_augmentation(load_script, dataset, tmp_path):
    load_script("docs/augmentation.py")["main"](str(dataset), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_how_well_the_students_fit(load_script, dataset, tmp_path):
    load_script("docs/student_fit.py")["main"](str(dataset), tmp_path / "fit.csv", n=20)
    with open(tmp_path / "fit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["version"], row["student"]) for row in rows] == [
        (row["version"], row["student"]) for row in read("student_fit.csv")]
    assert all(float(row["divergence"]) > 0 for row in rows)


def test_benchmark(load_script, dataset, monkeypatch, capsys):
    monkeypatch.setattr(eval, "reuse_freed_memory", lambda: None)
    load_script("tests/benchmark.py")["main"](["--rounds", "1", "--data-dir", str(dataset)])
    out = capsys.readouterr().out
    for words in ("fast, float32", "best, float32, 16x16", "with teachers", "augmentation", "as trained"):
        assert words in out
