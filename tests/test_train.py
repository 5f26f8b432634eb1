"""train.py: what a run leaves behind, resuming, the schedule, the options. Nothing here compiles but one test."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

import eval
import train
from data import Split, load_training_data
from model import build_network, load_weights, save_weights

QUICK = ["--recipe", "report", "--batch-size", "30", "--set", "compile=False", "--device", "cpu"]


def train_with(folder, dataset, *options: str) -> int:
    return train.main(["--data-dir", str(dataset), "--run-dir", str(folder), "--out", str(folder / "weights.pkl"),
                       *QUICK, *options])


def rows_of(folder) -> list[dict]:
    """The rows of metrics.csv without the seconds, which no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """The directory of an uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_with(folder, dataset, "--epochs", "3") == 0
    return folder


def copy_of(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def assert_same_runs(a, b) -> None:
    assert rows_of(a) == rows_of(b)
    states = [load_weights(folder / "weights.pkl")[0].state_dict() for folder in (a, b)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- a run ------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(finished):
    assert {path.name for path in finished.iterdir()} == {
        "metrics.csv", "accuracy.png", "loss.png", "result.json", "checkpoint.pt", "weights.pkl"}
    rows = rows_of(finished)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    result = json.loads((finished / "result.json").read_text())
    assert result["accuracy"] == float(rows[-1]["test_accuracy"]) and result["loss"] == float(rows[-1]["test_loss"])
    assert {"recipe", "seed", "lr", "torch", "torchvision", "python", "device", "threads", "seconds"} <= result.keys()
    assert Image.open(finished / "accuracy.png").size == Image.open(finished / "loss.png").size


def test_it_learns(finished):
    accuracies = [float(row["test_accuracy"]) for row in rows_of(finished)]
    assert accuracies[-1] > 60  # ten classes: chance is 10
    assert float(rows_of(finished)[-1]["train_loss"]) < float(rows_of(finished)[0]["train_loss"])


def test_eval_gives_the_accuracy_that_train_gave(finished, dataset, capsys):
    eval.main(["--weights", str(finished / "weights.pkl"), "--data-dir", str(dataset), "--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == float(rows_of(finished)[-1]["test_accuracy"]) == result["trained"]["accuracy"]


def test_equal_seeds_give_equal_runs_and_other_seeds_others(finished, dataset, tmp_path):
    for seed in (0, 1):
        assert train_with(tmp_path / str(seed), dataset, "--epochs", "3", "--seed", str(seed)) == 0
    assert rows_of(tmp_path / "0") == rows_of(finished) != rows_of(tmp_path / "1")


def test_output(dataset, tmp_path, capsys):
    assert train_with(tmp_path, dataset, "--epochs", "1", "--validate") == 0
    out = capsys.readouterr().out
    assert "47,410 trainable of 47,410 parameters; 540 training samples, 20 held-out images" in out
    assert "device cpu" in out and "threads" in out and "\r" not in out
    assert out.count("epoch  train loss") == 1


def test_plots_are_made_from_the_csv_alone(finished, tmp_path):
    (tmp_path / "metrics.csv").write_bytes((finished / "metrics.csv").read_bytes())
    assert train.main(["--plots-only", "--run-dir", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "accuracy.png").size > (300, 300) and (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("contents", [None, "", "epoch,loss\n1,2\n", "no log"])
def test_plots_of_no_log(contents, tmp_path, capsys):
    if contents is not None:
        (tmp_path / "metrics.csv").write_text(contents)
    assert train.main(["--plots-only", "--run-dir", str(tmp_path)]) == 2
    assert "is no log of a run" in capsys.readouterr().err


def test_validation_does_not_replace_the_weights(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data-dir", str(dataset), "--epochs", "1", "--validate", *QUICK]) == 0
    assert not (tmp_path / "weights.pkl").exists()
    assert (tmp_path / "runs/report-seed0-validate/weights.pkl").exists()


def test_loss_that_is_no_number(dataset, tmp_path, capsys):
    assert train_with(tmp_path, dataset, "--lr", "1e30", "--epochs", "2") == 2
    assert "try a smaller --lr" in capsys.readouterr().err


# --- resuming ---------------------------------------------------------------------------------


def start(folder, dataset, *options: str) -> subprocess.Popen:
    command = ["--data-dir", dataset, "--run-dir", folder, "--out", folder / "weights.pkl", *QUICK, *options]
    small = f"import sys, data, train; data.SIZES = {SMALL}; sys.exit(train.main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", small, *map(str, command)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_epoch(process: subprocess.Popen, epoch: int) -> None:
    for line in process.stdout:
        if line.startswith(f"{epoch:5}  "):
            return
    raise AssertionError(process.stderr.read())


def test_killed_and_resumed_equals_uninterrupted(finished, dataset, tmp_path):
    process = start(tmp_path, dataset, "--epochs", "3")
    wait_for_epoch(process, 1)
    process.kill()
    process.wait()
    assert len(rows_of(tmp_path)) < 3 and not (tmp_path / "weights.pkl").exists()
    assert train_with(tmp_path, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(finished, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="sends the signal of Ctrl-C")
def test_ctrl_c_says_how_to_resume(dataset, tmp_path):
    process = start(tmp_path, dataset, "--epochs", "50")
    wait_for_epoch(process, 1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
    assert train.read_archive(tmp_path / "checkpoint.pt", "")["epochs_done"] >= 1


def test_resuming_a_finished_run_changes_nothing(finished, dataset, tmp_path):
    folder = copy_of(finished, tmp_path)
    (folder / "weights.pkl").unlink()
    (folder / "metrics.csv").unlink()  # as after a kill between the last checkpoint and the log
    assert train_with(folder, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(folder, finished)


def test_resume_without_a_checkpoint(dataset, tmp_path, capsys):
    assert train_with(tmp_path, dataset, "--resume") == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_part_of_a_pass(dataset, tmp_path):
    assert train_with(tmp_path, dataset, "--epochs", "1.5") == 0
    assert [(row["epoch"], float(row["lr"])) for row in rows_of(tmp_path)][1] == ("1.5", 0.0)
    assert train_with(tmp_path, dataset, "--epochs", "0.01") == 0  # less than a step: one step
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["0.01"]


def whole_and_in_parts(dataset, folder, monkeypatch, *options: str) -> tuple[Path, Path]:
    """The directories of a run of two epochs, and of one that was stopped behind the first and resumed."""
    whole, parts = folder / "whole", folder / "parts"
    options = ("--epochs", "2", *options)
    assert train_with(whole, dataset, *options) == 0
    save = train.write_csv

    def interrupted(path, rows):
        save(path, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_csv", interrupted)
        assert train_with(parts, dataset, *options) == 130
    assert len(rows_of(parts)) == 1
    assert train_with(parts, dataset, *options, "--resume") == 0
    return whole, parts


def test_fast_learns_and_resumes(dataset, tmp_path, monkeypatch):
    options = ("--recipe", "fast", "--lr", "0.02")
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, *options)
    assert float(rows_of(whole)[-1]["test_accuracy"]) > 60  # ten classes: chance is 10
    assert_same_runs(whole, parts)
    assert train_with(tmp_path, dataset, *options, "--epochs", "2", "--set", "redraw=False") == 0
    losses, fixed = ([row["train_loss"] for row in rows_of(folder)] for folder in (whole, tmp_path))
    assert losses[0] == fixed[0] and losses[1] != fixed[1]  # the second pass is the first with other draws


def test_what_is_learnt_from_teachers(finished, dataset, tmp_path, monkeypatch):
    """The student never sees a label: one whose teacher exchanges all classes learns the exchanged ones."""
    teacher, facts = load_weights(finished / "weights.pkl")
    last = teacher.classifier[2]
    last.weight.data, last.bias.data = last.weight.data.roll(1, dims=0), last.bias.data.roll(1, dims=0)
    save_weights(tmp_path / "teacher.pkl", teacher, facts.pop("network"), **facts)
    options = ("--recipe", "fast", "--lr", "0.02", "--teachers", str(tmp_path / "teacher.pkl"))
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, *options)
    assert_same_runs(whole, parts)
    assert float(rows_of(whole)[-1]["test_accuracy"]) < 5
    student, _ = load_weights(whole / "weights.pkl")
    _, test = load_training_data(dataset)
    assert eval.evaluate(student, Split(test.images, (test.labels + 1) % 10))[0] > 60
    assert json.loads((whole / "result.json").read_text())["teachers"] == [
        f"report, recipe report, seed 0, {facts['epochs']:g} epochs, {facts['accuracy']:.2f} %"]


def test_teachers_of_the_committed_weights():
    """Those in the README's command are those that the recorded run had."""
    named = re.findall(r"docs/best/teachers/\S+\.pkl", (ROOT / "README.md").read_text(encoding="utf-8"))
    recorded = json.loads((ROOT / "docs/best/taught-gated-seed0/result.json").read_text())["teachers"]
    assert [train.describe(load_weights(ROOT / name)[1]) for name in named] == recorded


def test_teachers_that_have_seen_the_held_out_images(finished, dataset, tmp_path, capsys):
    teacher = ("--teachers", str(finished / "weights.pkl"))
    assert train_with(tmp_path, dataset, "--validate", *teacher) == 2
    assert "has learnt from the held-out images" in capsys.readouterr().err


def test_replaced_weights_are_named(finished, dataset, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    accuracy = load_weights(folder / "weights.pkl")[1]["accuracy"]
    assert train_with(folder, dataset, "--epochs", "1", "--seed", "4") == 0
    out = capsys.readouterr().out
    assert f"those of report, recipe report, seed 0, 3 epochs, {accuracy:.2f} %" in out
    assert f"git checkout {folder / 'weights.pkl'}" in out


@pytest.mark.parametrize("options, difference", [
    (["--epochs", "4"], "epochs 3.0 there, 4.0 here"),
    (["--epochs", "3", "--seed", "1"], "seed 0 there, 1 here"),
    (["--epochs", "3", "--set", "dropout=0"], "dropout 0.2 there, 0.0 here"),
    (["--epochs", "3", "--validate"], "validate False there, True here"),
])
def test_resume_with_other_settings(options, difference, finished, dataset, tmp_path, capsys):
    assert train_with(copy_of(finished, tmp_path), dataset, "--resume", *options) == 2
    error = capsys.readouterr().err
    assert difference in error and error.count("\n") == 1


def test_resume_from_a_damaged_checkpoint(finished, dataset, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-500])
    assert train_with(folder, dataset, "--epochs", "3", "--resume") == 2
    assert "damaged" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_log(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("old")
    with pytest.raises(ValueError):
        train.write_csv(path, [{"epoch": 1}, {"epoch": 2, "surprise": 3}])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- schedule and options ---------------------------------------------------------------------


def test_rate_share():
    recipe = dataclasses.replace(train.RECIPES["report"], warmup=0.25, final_lr=0.1)
    assert train.rate_share(recipe, 0.125) == pytest.approx(0.5)
    assert train.rate_share(recipe, 0.25) == pytest.approx(1.0)
    assert train.rate_share(recipe, 0.625) == pytest.approx(0.55)
    assert train.rate_share(recipe, 1.0) == pytest.approx(0.1)
    constant = dataclasses.replace(recipe, warmup=0.0, final_lr=1.0)
    assert all(train.rate_share(constant, progress) == pytest.approx(1.0) for progress in (0.0, 0.5, 1.0))


def test_image_side():
    recipe = dataclasses.replace(train.RECIPES["report"], small=0.6)
    assert [train.image_side(recipe, progress) for progress in (0.01, 0.3, 0.31, 0.6, 0.61, 1.0)] == [
        16, 16, 24, 24, 32, 32]
    assert train.image_side(dataclasses.replace(recipe, small=0.0), 0.001) == 32


def test_smoothed_loss_against_torch():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 10), torch.arange(20) % 10
    for smoothing in (0.0, 0.2):
        assert torch.allclose(train.smoothed_loss(logits.log_softmax(dim=1), labels, smoothing),
                              torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_soft_targets_are_the_teachers_mean():
    teachers = [lambda images, p=p: torch.tensor([p]).log().expand(len(images), -1) for p in ([0.5, 0.5], [0.9, 0.1])]
    images = torch.zeros(3, 3, 32, 32)
    assert torch.allclose(train.soft_targets(teachers, images, 1.0), torch.tensor([0.7, 0.3]))
    roots = torch.tensor([0.7, 0.3]).sqrt()
    assert torch.allclose(train.soft_targets(teachers, images, 2.0), roots / roots.sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_the_distillation_loss(temperature):
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 10, requires_grad=True), torch.randn(1, 10).softmax(dim=1)
    train.distillation_loss(logits.log_softmax(dim=1), targets, temperature).backward()
    assert torch.allclose(logits.grad, (logits / temperature).softmax(dim=1) - targets, atol=1e-6)


def test_every_recipe_is_within_the_limit():
    for recipe in train.RECIPES.values():
        build_network(recipe.network, dropout=recipe.dropout)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_optimizers(optimizer, dataset, tmp_path):
    assert train_with(tmp_path, dataset, "--recipe", "fast", "--epochs", "1", "--set", f"optimizer={optimizer}",
                      "--lr", "0.001") == 0
    assert math.isfinite(float(rows_of(tmp_path)[0]["train_loss"]))


@pytest.mark.parametrize("options, message", [
    (["--epochs", "0"], "0 is not above zero"),
    (["--lr", "nan"], "nan is not above zero"),
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--set", "size=3"], "a recipe has no value 'size'"),
    (["--set", "dropout=much"], "dropout takes float values, not 'much'"),
    (["--set", "optimizer=magic"], "one of them is out of range"),
    (["--set", "lr=nan"], "one of them is out of range"),
    (["--set", "temperature=0"], "one of them is out of range"),
    (["--teachers", "none.pkl"], "there is no file none.pkl"),
    (["--set", "warmup=1"], "one of them is out of range"),
    (["--set", "epochs=0"], "one of them is out of range"),
    (["--seed", "-1"], "-1 is not between 0 and"),
    (["--recipe", "none"], "invalid choice: 'none'"),
    (["--set", "optimizer=muon"], "choose another optimizer or network"),
    (["--set", "network=paired 64x1@8"], "is no stage"),
])
def test_bad_options(options, message, dataset, tmp_path, capsys):
    try:
        status = train_with(tmp_path, dataset, *options)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--run-dir", "--out"])
def test_places_that_cannot_be_written(option, dataset, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = {"--run-dir": tmp_path / "run", "--out": tmp_path / "weights.pkl", option: tmp_path / "file" / "x"}
    words = [str(word) for pair in places.items() for word in pair]
    assert train.main(["--data-dir", str(dataset), *words, *QUICK]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_fresh_start_removes_what_an_earlier_run_left(finished, dataset, tmp_path):
    folder = copy_of(finished, tmp_path)
    process = start(folder, dataset, "--epochs", "3")
    for line in process.stdout:
        if line.startswith("epoch "):  # the head of the table: nothing is trained yet
            break
    process.kill()
    process.wait()
    assert {path.name for path in folder.iterdir()} == {"weights.pkl"}


@pytest.fixture
def compiler():
    if not train.can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")


def test_compiled_run_resumes_too(compiler, dataset, tmp_path, monkeypatch):
    assert_same_runs(*whole_and_in_parts(dataset, tmp_path, monkeypatch, "--set", "compile=True"))


def test_compiled_network_computes_the_same(compiler):
    torch.manual_seed(0)
    network = build_network("report", dropout=0.0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    gradients = []
    for step_network in (network, torch.compile(network, dynamic=False)):
        network.zero_grad()
        torch.nn.functional.nll_loss(step_network(images), labels).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
