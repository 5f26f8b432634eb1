"""train.py: what a run leaves behind, resuming, what a run must not replace, the optimisation, the options."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_loader, make_split
from PIL import Image

import data
import eval
import model
import train
from data import Split, UserError, load_training_data

QUICK = ["--recipe", "report", "--batch-size", "30", "--device", "cpu"]


def options_for(folder: Path, dataset: Path) -> list[str]:
    return ["--data-dir", str(dataset), "--run-dir", str(folder), "--out", str(folder / "weights.pkl"), *QUICK]


def train_in(folder: Path, dataset: Path, *options: str) -> int:
    return train.main([*options_for(folder, dataset), *options])


def rows_of(folder: Path) -> list[dict]:
    """The rows of metrics.csv without the seconds, which no two runs share."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """The directory of an uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_in(folder, dataset, "--epochs", "3") == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def unfinished(dataset, tmp_path, monkeypatch):
    """The directory of a run that was interrupted after the first of three epochs."""
    interrupt_after_an_epoch(monkeypatch, train_in, tmp_path / "unfinished", dataset, "--epochs", "3")
    return tmp_path / "unfinished"


def interrupt_after_an_epoch(monkeypatch, function, *args) -> None:
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "table_line", interrupt)  # called when the checkpoint of an epoch is written
        assert function(*args) == 130


def assert_same_runs(a: Path, b: Path) -> None:
    assert rows_of(a) == rows_of(b)
    states = [model.load_weights(folder / "weights.pkl")[0].state_dict() for folder in (a, b)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- a run ----------------------------------------------------------------------------------------

def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.iterdir()} - {"lock"}  # which some versions of filelock remove
    assert names == {"metrics.csv", "accuracy.png", "loss.png", "result.json", "checkpoint.pt", "weights.pkl"}
    rows = rows_of(finished)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_accuracy"]) > 60  # ten classes: chance is 10
    result = json.loads((finished / "result.json").read_text())
    assert result["accuracy"] == float(rows[-1]["test_accuracy"]) and result["loss"] == float(rows[-1]["test_loss"])
    assert {"recipe", "seed", "lr", "parameters", "seconds"} <= result.keys()
    (sitting,) = result["sittings"]
    assert {"processor", "threads", "bfloat16", "python", "torch", "torchvision"} <= sitting.keys()
    assert (sitting["device"], sitting["epochs"]) == ("cpu", 3) and sitting["seconds"] == pytest.approx(
        result["seconds"], abs=0.1)


def test_the_training_curve_is_that_of_training_images_as_they_are(finished, dataset):
    """So that both curves of a graph answer the same question."""
    training, _ = load_training_data(dataset)
    network, _ = model.load_weights(finished / "weights.pkl")
    last = rows_of(finished)[-1]
    assert (float(last["train_accuracy"]), float(last["train_loss"])) == eval.evaluate(network, training)


def test_eval_gives_the_accuracy_that_train_gave(finished, dataset, capsys):
    eval.main(["--weights", str(finished / "weights.pkl"), "--data-dir", str(dataset), "--json", "--device", "cpu"])
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] == float(rows_of(finished)[-1]["test_accuracy"]) == report["trained"]["accuracy"]


def test_equal_seeds_give_equal_runs_and_other_seeds_others(finished, dataset, tmp_path):
    for seed in (0, 1):
        assert train_in(tmp_path / str(seed), dataset, "--epochs", "3", "--seed", str(seed)) == 0
    assert rows_of(tmp_path / "0") == rows_of(finished) != rows_of(tmp_path / "1")


def test_output(dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--epochs", "1", "--validate") == 0
    out = capsys.readouterr().out
    assert "recipe report, seed 0: network report, 47,410 parameters\n" in out
    assert "180 training images, augmented to 540; measured on 20 held-out images\n" in out
    assert "device cpu" in out and "threads" in out and "\r" not in out
    assert out.count("epoch  train loss") == 1 and "val acc" in out
    assert rows_of(tmp_path)[0].keys() >= {"val_loss", "val_accuracy"}


def test_every_run_keeps_its_weights(dataset, tmp_path, monkeypatch, capsys):
    """weights.pkl is that of the last run, as eval.py expects; each run has its own in its directory."""
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"):
        assert train.main(["--data-dir", str(dataset), "--epochs", "0.1", "--seed", seed, *QUICK]) == 0
        own = Path(f"runs/report-0.1ep-seed{seed}-batch_size=30/weights.pkl")
        assert capsys.readouterr().out.endswith(f"the weights are in {own} and weights.pkl\n")
        assert model.load_weights(own)[1]["seed"] == model.load_weights("weights.pkl")[1]["seed"] == int(seed)
    assert model.load_weights("runs/report-0.1ep-seed0-batch_size=30/weights.pkl")[1]["seed"] == 0


@pytest.mark.skipif(os.name != "posix", reason="makes a link and a pipe")
def test_out_that_is_no_plain_file(dataset, tmp_path):
    """A link is followed, a device or a pipe is written to."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    data.atomic_write(tmp_path / "link", b"contents")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"contents"
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data.atomic_write(tmp_path / "pipe", b"contents")
    assert os.read(reader, 100) == b"contents" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("prefix, label", [("test", "test set"), ("val", "held-out images")])
def test_the_graphs_show_what_the_log_holds(prefix, label, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *args, label: drawn.append((x, y, label)))
    monkeypatch.setattr(Axes, "legend", lambda axes: None)
    history = [{"epoch": epoch, "train_loss": 2.0 - epoch, f"{prefix}_loss": 2.1 - epoch} for epoch in (1, 1.5)]
    assert eval.plot_history(history, "loss", "a$b_$c").startswith(b"\x89PNG")
    assert drawn == [([1, 1.5], [1.0, 0.5], "5,000 training images"), ([1, 1.5], [1.1, pytest.approx(0.6)], label)]


def test_the_backend_of_a_notebook_is_not_needed(python, dataset, tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [*python, str(ROOT / "train.py"), *options_for(tmp_path / "r", dataset), "--epochs", "0.1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and (tmp_path / "r" / "loss.png").exists()


def test_graphs_that_fail_are_one_line_before_the_first_step(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert train_in(tmp_path, dataset, "--epochs", "2") == 0
    out = capsys.readouterr().out
    assert out.count("the graphs cannot be drawn") == 1 < out.index("epoch  train loss") - out.index("cannot be drawn")
    assert (tmp_path / "result.json").exists() and not (tmp_path / "loss.png").exists()


def test_an_infinite_loss(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3072, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(),
        torch.nn.Linear(8, 10)))
    options = ["--network", "mine", "--optimizer", "sgd", "--lr", "1e6", "--epochs", "2"]
    assert train_in(tmp_path, dataset, *options) == 2
    assert "the loss is not finite in epoch 1: try a smaller --lr" in capsys.readouterr().err


def test_a_part_of_a_pass(dataset, tmp_path):
    assert train_in(tmp_path, dataset, "--epochs", "1.5") == 0
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "1.5"]


def test_a_whole_recipe(dataset, tmp_path):
    """Without any option for a setting, which would have the type of the command line."""
    options = ["--recipe", "quick", "--data-dir", str(dataset), "--run-dir", str(tmp_path)]
    assert train.main([*options, "--out", str(tmp_path / "w")]) == 0
    assert model.load_weights(tmp_path / "w")[1]["epochs"] == 1.0


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_run_of_one_step_trains(recipe, dataset, tmp_path):
    """The learning rate is not zero at the last step."""
    assert train_in(tmp_path, dataset, "--recipe", recipe, "--epochs", "0.01") == 0
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["0.01"] and float(rows_of(tmp_path)[0]["lr"]) > 0
    torch.manual_seed(0)
    initial = model.build_network(train.RECIPES[recipe].network)
    trained, _ = model.load_weights(tmp_path / "weights.pkl")
    assert not torch.equal(initial.features[0].weight, trained.features[0].weight)


# --- progress -------------------------------------------------------------------------------------

def test_the_time_left(monkeypatch):
    """It is right from the first epoch on, also of a resumed run, however slow the machine is in all."""
    costs = [0.1] * 150 + [0.3] * 200 + [1.0] * 650  # as rehearsed
    clock = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    for first in (0, 400):
        progress, left, times = train.Progress(costs, first, 100), {}, {}
        for step in range(first, 1000):
            clock[0] += 2 * costs[step] + 2 * (step % 100 == 0)  # twice as slow; 2 seconds of augmentation
            left[step], times[step] = progress.left(step), clock[0]
        for step in (99, 199, 550, 899, 999):
            if step >= first:
                hours, minutes, seconds = map(int, left[step].split(":"))
                seconds += 3600 * hours + 60 * minutes
                assert seconds == pytest.approx(clock[0] - times[step], rel=0.1, abs=1), step


def test_a_rehearsal_leaves_the_network_as_it_is(monkeypatch):
    network = model.build_network("plain")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    monkeypatch.setattr(train.timeit, "repeat",
                        lambda task, number, repeat: [task() or 9.0, {16: 3.0, 32: 5.0}[task.args[0]], 6.0])
    assert train.rehearse(network, [], make_loader(make_split(20)), [16, 16, 32]) == [3, 3, 5]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    progress = train.Progress([1.0] * 100_000, 0, 1000)
    for step in range(1000):
        clock[0] += 1.0
        progress.after_step(step)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"      step 61 of 1000, 1 day, 3:45:39 left", lines[0]) and len(lines) == 2


# --- resuming -------------------------------------------------------------------------------------

def start(python: list[str], folder: Path, dataset: Path, *options: str) -> subprocess.Popen:
    """Start train.py in a process of its own."""
    command = [*python, str(ROOT / "train.py"), *options_for(folder, dataset), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen, beginning: str) -> None:
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


def test_killed_and_resumed_equals_uninterrupted(python, finished, dataset, tmp_path):
    process = start(python, tmp_path, dataset, "--epochs", "3")
    wait_for_line(process, "    1  ")
    process.kill()
    process.wait()
    assert len(rows_of(tmp_path)) < 3 and not (tmp_path / "weights.pkl").exists()
    assert train_in(tmp_path, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(finished, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="sends the signal of Ctrl-C")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_resume(number, python, dataset, tmp_path):
    process = start(python, tmp_path, dataset, "--epochs", "50")
    wait_for_line(process, "    1  ")
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"\nstopped: the run is safe up to epoch \d+: the same command, with --resume .*\n", error)
    assert len(rows_of(tmp_path)) >= 1


@pytest.mark.skipif(os.name != "posix", reason="sends the signal of Ctrl-C")
def test_ctrl_c_in_the_first_epoch_does_not_advise_to_resume(python, dataset, tmp_path):
    process = start(python, tmp_path, dataset, "--epochs", "50", "--autoaugment-group-size", "1", "--batch-size", "1")
    wait_for_line(process, "epoch  ")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert error == "\nstopped: no epoch was finished: start again with the same command\n"
    assert train_in(tmp_path, dataset, "--epochs", "1") == 0


def test_resuming_a_finished_run_changes_nothing(copied, finished, dataset, monkeypatch):
    (copied / "weights.pkl").unlink()
    monkeypatch.setattr(train, "rehearse", None)  # there is no step to rehearse
    assert train_in(copied, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(copied, finished)


def test_a_run_moves_to_a_machine_without_bfloat16(dataset, tmp_path, monkeypatch, capsys):
    """It goes on in float32 and says so, and the record has both machines."""
    monkeypatch.setattr(eval, "has_bf16", lambda device: True)
    interrupt_after_an_epoch(monkeypatch, train_in, tmp_path, dataset, "--epochs", "2")
    monkeypatch.setattr(eval, "has_bf16", lambda device: False)
    assert train_in(tmp_path, dataset, "--epochs", "2", "--resume") == 0
    assert "amp_bf16 was True, is False: the run goes on, but to slightly different weights" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(sitting["bfloat16"], sitting["epochs"]) for sitting in result["sittings"]] == [(True, 1), (False, 1)]
    assert result["seconds"] == pytest.approx(sum(sitting["seconds"] for sitting in result["sittings"]), abs=0.1)


def test_a_checkpoint_is_no_weights_file(finished, capsys):
    assert eval.main(["--weights", str(finished / "checkpoint.pt")]) == 2
    error = capsys.readouterr().err
    assert "holds 'settings, history, sittings, network, averaged, optimizer_states', not metadata, state: nam" in error
    assert error.count("\n") == 1


def test_resume_without_a_checkpoint(dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--resume") == 2
    assert re.fullmatch(
        r"error: there is no file \S+checkpoint\.pt: repeat the options of the run, name its --run-dir, or start anew "
        r"without --resume\n",
        capsys.readouterr().err)


@pytest.mark.parametrize("options, difference", [
    (["--epochs", "4"], "epochs was 3.0, is 4.0"),
    (["--epochs", "3", "--seed", "1"], "seed was 0, is 1"),
    (["--epochs", "3", "--label-smoothing", "0.1"], "label_smoothing was 0.0, is 0.1"),
    (["--epochs", "3", "--validate"], "validate was False, is True"),
])
def test_resume_with_other_settings(options, difference, copied, dataset, capsys):
    assert train_in(copied, dataset, "--resume", *options) == 2
    error = capsys.readouterr().err
    assert difference in error and error.count("\n") == 1


def test_resume_after_the_network_was_changed(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: model.FlipNet((8, 8, 8), (0, 1, 1)))
    assert train_in(tmp_path, dataset, "--network", "mine", "--epochs", "1") == 0
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: model.FlipNet((8, 8, 8), (0, 1, 2)))
    assert train_in(tmp_path, dataset, "--network", "mine", "--epochs", "1", "--resume") == 2
    error = capsys.readouterr().err
    assert "do not fit the network 'mine' of this model.py" in error and error.count("\n") == 1


def test_resume_from_a_damaged_checkpoint(copied, dataset, capsys):
    checkpoint = copied / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-500])
    assert train_in(copied, dataset, "--epochs", "3", "--resume") == 2
    assert "damaged" in capsys.readouterr().err


def whole_and_in_parts(dataset, folder, monkeypatch, *options: str) -> tuple[Path, Path]:
    """The directories of a run of two epochs, and of one that was interrupted after the first and resumed."""
    whole, parts = folder / "whole", folder / "parts"
    options = ("--epochs", "2", *options)
    assert train_in(whole, dataset, *options) == 0
    interrupt_after_an_epoch(monkeypatch, train_in, parts, dataset, *options)
    assert len(rows_of(parts)) == 1
    assert train_in(parts, dataset, *options, "--resume") == 0
    return whole, parts


def test_fast_learns_and_resumes(dataset, tmp_path, monkeypatch):
    options = ("--recipe", "fast", "--lr", "0.02", "--averaged-share", "0.7")  # the mean begins in the first epoch
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, *options)
    assert float(rows_of(whole)[-1]["test_accuracy"]) > 60  # ten classes: chance is 10
    assert_same_runs(whole, parts)
    assert train_in(tmp_path / "fixed", dataset, *options, "--epochs", "2", "--no-resample") == 0
    losses, fixed = ([row["batch_loss"] for row in rows_of(folder)] for folder in (whole, tmp_path / "fixed"))
    assert losses[0] == fixed[0] and losses[1] != fixed[1]  # the second epoch has other draws


@pytest.mark.parametrize("epochs, averaged, batches", [("3", 2, 20), ("2.5", 1, 10)])
def test_the_weights_of_the_last_epochs_are_averaged(epochs, averaged, batches, dataset, tmp_path, monkeypatch):
    """The network that is saved has their mean, and norms with statistics of their own, from 600 images in batches of
    30, or from as many as a last epoch that is not whole has."""
    weights, train_one_epoch = [], train.train_one_epoch

    def train_and_keep(network, step, loader, steps, *args):
        loss = train_one_epoch(network, step, loader, steps, *args)
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        return loss

    monkeypatch.setattr(train, "train_one_epoch", train_and_keep)
    assert train_in(tmp_path, dataset, "--recipe", "fast", "--epochs", epochs, "--averaged-share", "0.5") == 0
    network, _ = model.load_weights(tmp_path / "weights.pkl")
    for parameter, *values in zip(network.parameters(), *weights, strict=True):
        assert torch.allclose(parameter, torch.stack(values[-averaged:]).mean(dim=0), atol=1e-5)
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == batches
    last = rows_of(tmp_path)[-1]
    assert float(last["test_accuracy"]) > 60  # ten classes: chance is 10
    test = data.load_split(dataset, "test")
    assert (float(last["test_accuracy"]), float(last["test_loss"])) == eval.evaluate(network, test)


# --- what a run must not replace ------------------------------------------------------------------

def test_an_unfinished_run_is_not_replaced(unfinished, finished, dataset, capsys):
    before = (unfinished / "checkpoint.pt").read_bytes()
    assert train_in(unfinished, dataset, "--epochs", "3") == 2
    error = capsys.readouterr().err
    assert "holds an unfinished run, which --resume continues: name another" in error and error.count("\n") == 1
    assert "--resume" in error and "--overwrite" in error
    assert (unfinished / "checkpoint.pt").read_bytes() == before
    assert train_in(unfinished, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(unfinished, finished)


def test_a_damaged_checkpoint_is_not_replaced_either(unfinished, dataset, capsys):
    (unfinished / "checkpoint.pt").write_bytes(b"damaged")
    assert train_in(unfinished, dataset, "--epochs", "3") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_finished_run_is_not_replaced(copied, dataset, capsys):
    assert train_in(copied, dataset, "--epochs", "3") == 2
    error = capsys.readouterr().err
    assert f"{copied} holds a finished run, which --resume saves again, for another --out or --calibrate: name" in error
    assert error.endswith("name another --run-dir, or start over with --overwrite\n")
    assert error.count("\n") == 1


def test_foreign_files_are_not_replaced(dataset, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("mine")
    assert train_in(tmp_path, dataset, "--epochs", "3") == 2
    assert f"{tmp_path} holds other files" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == "mine"


def test_overwrite_keeps_the_old_run_until_the_first_epoch_is_finished(copied, dataset, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    names = {path.name for path in copied.iterdir()}
    contents = {name: (copied / name).read_bytes() for name in names - {"lock"}}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", interrupt)
        assert train_in(copied, dataset, "--epochs", "3", "--overwrite") == 130
    assert {name: (copied / name).read_bytes() for name in contents} == contents
    interrupt_after_an_epoch(monkeypatch, train_in, copied, dataset, "--epochs", "3", "--overwrite")
    assert len(rows_of(copied)) == 1 and not {"result.json", "weights.pkl"} & {path.name for path in copied.iterdir()}
    assert Image.open(copied / "accuracy.png").size == Image.open(copied / "loss.png").size  # drawn after each epoch


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_a_drive_without_locks_is_a_warning(error, dataset, tmp_path, monkeypatch, capsys):
    def acquire(*args, **options):
        raise error

    monkeypatch.setattr(data.FileLock, "acquire", acquire)
    assert train_in(tmp_path, dataset, "--epochs", "0.1") == 0
    error = capsys.readouterr().err
    assert re.fullmatch(r"warning: \S+ cannot be locked \(.*\): let no other process write there\n", error)


def test_two_processes_do_not_share_a_directory(python, dataset, tmp_path, capsys):
    process = start(python, tmp_path, dataset, "--epochs", "50")
    wait_for_line(process, "epoch  ")
    assert train_in(tmp_path, dataset, "--epochs", "50", "--overwrite") == 2
    assert f"another process trains in {tmp_path}" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert train_in(tmp_path, dataset, "--epochs", "1", "--overwrite") == 0  # the lock of a dead process is free


@pytest.mark.parametrize("options, name", [
    ([], "report-20ep-seed0"),
    (["--seed", "1"], "report-20ep-seed1"),
    (["--epochs", "0.5"], "report-0.5ep-seed0"),
    (["--lr", "0.01", "--no-amp-bf16"], "report-20ep-seed0-lr=0.01-amp_bf16=False"),
    (["--batch-size", "100"], "report-20ep-seed0-batch_size=100"),
    (["--teachers", "runs/a/weights.pkl", "b.pkl"], "report-20ep-seed0-a_weights-b"),
    (["--teachers", "runs/a/weights.pkl", "--teachers", "b.pkl"], "report-20ep-seed0-a_weights-b"),
    (["--teachers", "teacher?.pkl"], "report-20ep-seed0-teacher0-teacher1"),  # where the shell expands no patterns
    (["--validate"], "report-20ep-seed0-validate"),
])
def test_each_variant_has_a_directory_of_its_own(options, name, tmp_path, monkeypatch):
    used = []
    monkeypatch.chdir(tmp_path)
    for teacher in ("teacher0.pkl", "teacher1.pkl"):
        Path(teacher).touch()
    monkeypatch.setattr(train, "run_training", lambda args, recipe, run_dir, places: used.append(run_dir))
    assert train.main(["--recipe", "report", *options]) == 0
    assert used == [Path("runs") / name]


def test_many_teachers_do_not_hide_the_other_options(tmp_path, monkeypatch):
    used = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run_training", lambda args, recipe, run_dir, places: used.append(run_dir.name))
    teachers = [f"docs/runs/best-40ep-seed{i}/weights.pkl" for i in range(9)]
    for options in ([], ["--validate"]):
        assert train.main(["--teachers", *teachers, *options]) == 0
    assert len(set(used)) == 2 and all(len(name) <= 200 for name in used)


@pytest.mark.parametrize("name, options", [
    ("weights.pkl", ["--overwrite", "--teachers", "weights.pkl"]), ("checkpoint.pt", ["--resume"])])
def test_weights_replace_neither_a_teacher_nor_a_checkpoint(name, options, finished, dataset, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    before = Path(name).read_bytes()
    assert train_in(finished, dataset, *options, "--out", name) == 2
    assert f"{name} is a teacher or another file of the run: name another --out" in capsys.readouterr().err
    assert Path(name).read_bytes() == before


def test_validation_does_not_replace_the_weights(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data-dir", str(dataset), "--epochs", "1", "--validate", *QUICK]) == 0
    assert not (tmp_path / "weights.pkl").exists()
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "weights.pkl").exists()


@pytest.mark.parametrize("file, write_that_fails, epoch", [
    ("checkpoint.pt", 2, 1), ("metrics.csv", 2, 2), ("metrics.csv", 3, 3), ("weights.pkl", 1, 3)])
def test_a_full_disk(file, write_that_fails, epoch, finished, dataset, tmp_path, monkeypatch, capsys):
    """One sentence says which file, that the run is safe, and how to continue; and it is safe."""
    write, writes = Path.write_bytes, []

    def fill_the_disk(path, contents):
        writes.append(path.name.startswith(file))
        if path.name.startswith(file) and sum(writes) == write_that_fails:
            raise OSError(28, "No space left on device")
        return write(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_the_disk)
        assert train_in(tmp_path, dataset, "--epochs", "3") == 2
    error = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path / file}'" in error and error.count("\n") == 1
    assert f"the run is safe up to epoch {epoch}: the same command, with --resume and without --over" in error
    assert not list(tmp_path.glob("*.part"))
    assert train_in(tmp_path, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(finished, tmp_path)


def test_a_full_disk_in_the_first_epoch(dataset, tmp_path, monkeypatch, capsys):
    def fill_the_disk(path, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    assert train_in(tmp_path, dataset, "--epochs", "1") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: [Errno 28] No space left on device: '{tmp_path / 'checkpoint.pt'}'")
    assert error.endswith("no epoch was finished: start again with the same command\n")


def test_memory_that_runs_out_after_an_epoch(dataset, tmp_path, monkeypatch, capsys):
    """A smaller batch would be another run."""
    train_one_epoch = train.train_one_epoch

    def fail_in_epoch_2(network, step, loader, *args):
        if loader.epoch:
            raise MemoryError
        return train_one_epoch(network, step, loader, *args)

    monkeypatch.setattr(train, "train_one_epoch", fail_in_epoch_2)
    assert train_in(tmp_path, dataset, "--epochs", "2") == 2
    assert "enough memory: close other programs; the run is safe up to epoch 1: the same" in capsys.readouterr().err


def test_out_in_a_new_folder_of_the_run(dataset, tmp_path):
    options = ["--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "run/final/w.pkl"), *QUICK]
    assert train.main(["--data-dir", str(tmp_path / "file"), *options, "--teachers", "missing.pkl"]) == 2
    assert not (tmp_path / "run").exists()
    assert train.main(["--data-dir", str(dataset), *options, "--epochs", "0.1"]) == 0
    assert (tmp_path / "run/final/w.pkl").exists()


@pytest.mark.parametrize("option", ["--run-dir", "--out"])
def test_places_that_cannot_be_written(option, dataset, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = {"--run-dir": tmp_path / "run", "--out": tmp_path / "weights.pkl", option: tmp_path / "file" / "x"}
    words = [str(word) for pair in places.items() for word in pair]
    assert train.main(["--data-dir", str(dataset), *words, *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'file' / 'x'}") and "cannot be written ([Errno " in error
    assert error.endswith("'): name a file in a folder that is writable\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("out", ["other", ".", "runs", "runs/new"])
def test_a_directory_as_out(out, dataset, tmp_path, monkeypatch, capsys):
    """The last two would be made by the run itself."""
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    assert train.main(["--data-dir", str(dataset), "--run-dir", "runs/new", "--out", out, *QUICK]) == 2
    message = "cannot be written" if out == "other" else "is the folder of the run or one above it: name a file"
    assert f"error: {out} {message}" in capsys.readouterr().err
    assert not Path("runs").exists()


# --- distillation ---------------------------------------------------------------------------------

def test_a_distilled_network_learns_from_its_teachers_alone(finished, dataset, tmp_path, monkeypatch, capsys):
    """No label is used: a student whose teacher shifts all classes by one learns the shifted ones. It is not resumed
    with another teacher of the same name, training and accuracy."""
    teacher, metadata = model.load_weights(finished / "weights.pkl")
    last = teacher.classifier[2]
    last.weight.data, last.bias.data = last.weight.data.roll(1, dims=0), last.bias.data.roll(1, dims=0)
    model.save_weights(tmp_path / "teacher.pkl", teacher, metadata)
    options = ("--recipe", "fast", "--lr", "0.02", "--teachers", str(tmp_path / "teacher.pkl"),
               "--teachers-per-batch", "3")
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, *options)
    assert_same_runs(whole, parts)
    assert float(rows_of(whole)[-1]["test_accuracy"]) < 5
    student, _ = model.load_weights(whole / "weights.pkl")
    _, test = load_training_data(dataset)
    assert eval.evaluate(student, Split(test.images, (test.labels + 1) % 10))[0] > 60
    result = json.loads((whole / "result.json").read_text())
    checksum = hashlib.md5((tmp_path / "teacher.pkl").read_bytes()).hexdigest()[:8]
    assert result["teachers"] == [
        f"network report, recipe report, 3 epochs, seed 0, {metadata['accuracy']:.2f} %, MD5 {checksum}"]
    assert result["label_smoothing"] == 0.0  # the recipe's 0.1 has no effect with teachers
    assert result["teachers_per_batch"] == 1  # there are no three
    shutil.copy(finished / "weights.pkl", tmp_path / "teacher.pkl")
    assert train_in(parts, dataset, "--epochs", "2", *options, "--resume") == 2
    assert f"holds another run (teachers was {result['teachers']}, is " in capsys.readouterr().err


def test_teachers_that_have_seen_the_held_out_images(finished, dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--validate", "--teachers", str(finished / "weights.pkl")) == 2
    assert "has seen the held-out images" in capsys.readouterr().err


@pytest.mark.parametrize("per_batch, turns", [(1, [[0], [1]]), (2, [[0, 1], [2, 0]])])
def test_the_teachers_take_turns(per_batch, turns):
    """A student that is not updated has the cross-entropy with the mean of the teachers whose turn it is."""
    torch.manual_seed(0)
    student = model.build_network("plain")
    teachers = [lambda images, k=k: torch.full((len(images), 10), 0.1).lerp(torch.eye(10)[k], 0.8).log()
                for k in (3, 7, 5)]
    loader = make_loader(make_split(20), batch_size=30)
    recipe = dataclasses.replace(train.RECIPES["report"], amp_bf16=False, teachers_per_batch=per_batch)
    step = train.make_step(student, teachers, [], recipe, [(32, 1.0)] * 2)
    loss = train.train_one_epoch(student, step, loader, range(2))
    expected = [F.cross_entropy(student(images), sum(teachers[i](images).exp() for i in turn) / per_batch).item()
                for (images, _), turn in zip(loader, turns, strict=True)]
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-4) and abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("batch_size", ["1", "599"])  # the second leaves one image for the last batch
def test_a_network_that_cannot_train_is_refused_before_the_first_step(
        batch_size, dataset, tmp_path, monkeypatch, capsys):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10), torch.nn.BatchNorm1d(10))
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: network)
    assert train_in(tmp_path, dataset, "--network", "mine", "--batch-size", batch_size) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: network mine cannot be trained (ValueError: Expected more than 1 value per channel")
    assert error.endswith("or try --no-amp-bf16 or another --batch-size\n")


def test_a_last_batch_of_one_small_image_is_tried_too(dataset, tmp_path, monkeypatch, capsys):
    """Its map has one pixel at 16x16, four at 32x32."""
    def build():
        return torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.BatchNorm2d(3), torch.nn.AdaptiveAvgPool2d(1),
                                   torch.nn.Flatten(), torch.nn.Linear(3, 10))

    monkeypatch.setitem(model.NETWORKS, "mine", build)
    options = ("--network", "mine", "--batch-size", "599", "--low-resolution-share")
    assert train_in(tmp_path, dataset, *options, "0.9") == 2
    assert "network mine cannot be trained (ValueError: Expected more than 1 value" in capsys.readouterr().err
    assert train_in(tmp_path, dataset, *options, "0") == 0


# --- calibration ----------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.3, 1.5, 4.0])
def test_the_temperature_that_fits(temperature):
    torch.manual_seed(0)
    logits = 2 * temperature * torch.randn(20_000, 10)
    labels = torch.multinomial((logits / temperature).softmax(dim=1), 1)[:, 0]
    assert eval.fit_temperature(logits.log_softmax(dim=1), labels) == pytest.approx(temperature, rel=0.03)


def test_a_temperature_is_folded_into_the_weights(finished, copied, dataset):
    """After the last epoch, so it can still be chosen when the run is finished."""
    assert train_in(copied, dataset, "--epochs", "3", "--calibrate", "2", "--resume") == 0
    before, after = (model.load_weights(folder / "weights.pkl")[0] for folder in (finished, copied))
    images = torch.randn(8, 3, 32, 32)
    assert torch.allclose(after(images), before(images) / 2, atol=1e-5)
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (finished, copied))
    assert after["accuracy"] == before["accuracy"] and after["loss"] != before["loss"]


class TwoHeads(torch.nn.Module):
    def __init__(self, init=lambda parameter: None):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3072, 5), torch.nn.Linear(3072, 10)
        for parameter in self.parameters():
            init(parameter)

    def forward(self, images):
        return self.first(images.flatten(1)).repeat(1, 2) + self.second(images.flatten(1))


class SoftCap(torch.nn.Module):
    """Divides small logits, as those of a fresh network are, but not large ones."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3072, 10)

    def forward(self, images):
        return 15 * torch.tanh(self.layer(images.flatten(1)) / 15)


@pytest.mark.parametrize("build", [
    lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 10, 32), torch.nn.Flatten()),
    lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10), torch.nn.Tanh()),
    lambda: TwoHeads(),
    lambda: TwoHeads(torch.nn.init.zeros_),
    lambda: SoftCap(),
])
def test_a_network_that_cannot_be_calibrated(build, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "mine", build)
    assert train_in(tmp_path, dataset, "--network", "mine", "--calibrate", "2") == 2
    out, error = capsys.readouterr()
    assert "--calibrate needs a last layer that is linear and returns the logits" in error and "epoch" not in out


def test_a_run_with_validate_prints_the_temperature(dataset, tmp_path, capsys):
    printed = []
    for options in (("--calibrate", "4"), ("--resume", "--calibrate", "5")):  # of the network as it was trained
        assert train_in(tmp_path, dataset, "--epochs", "0.1", "--validate", *options) == 0
        line = re.search(r"\nthe held-out loss is lowest with --calibrate (\d\.\d\d)\n", capsys.readouterr().out)
        printed.append(float(line[1]))
    assert printed[1] == pytest.approx(printed[0], abs=0.05)  # multiples of 0.04 and of 0.05


# --- optimisation and options ---------------------------------------------------------------------

def test_without_convolutions_sgd_takes_the_place_of_muon(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        model.NETWORKS, "mine", lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)))
    assert train_in(tmp_path, dataset, "--network", "mine", "--optimizer", "muon", "--epochs", "1") == 0
    assert "network mine has no convolution that muon takes: sgd with lr 0.03 instead\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["optimizer"], result["lr"]) == ("sgd", 0.03)


class StochasticDepth(torch.nn.Module):
    """Draws from the generators of Python and NumPy, as much code does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3072, 10)

    def forward(self, images):
        scale = random.random() + np.random.rand() if self.training else 1.0
        return self.linear(images.flatten(1)) * scale


def test_a_seed_is_of_all_generators(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "mine", StochasticDepth)
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, "--network", "mine")
    assert rows_of(whole) == rows_of(parts)
    draws = [network(torch.ones(1, 3072)).sum().item() for network in seeded(0, 0, 1, 2**31 - 1)]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def seeded(*seeds: int):
    for seed in seeds:
        train.set_seed(seed)
        (network := StochasticDepth()).linear.weight.data.fill_(1)
        yield network


class NotANumber(torch.nn.Module):
    """In evaluation only, and not on the first images."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3072, 10)

    def forward(self, images):
        logits = self.linear(images.flatten(1))
        return logits if self.training or len(images) < 3 else logits * math.nan


def test_a_loss_of_the_test_set_that_is_not_finite(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "mine", NotANumber)
    assert train_in(tmp_path, dataset, "--network", "mine", "--epochs", "1") == 2
    assert "error: the loss is not finite in epoch 1: try a smaller --lr" in capsys.readouterr().err
    assert not (tmp_path / "weights.pkl").exists()


def test_image_size():
    sizes = [train.image_size(progress, 0.6) for progress in (0.0, 0.29, 0.31, 0.59, 0.6, 1.0)]
    assert sizes == [16, 16, 24, 24, 32, 32] and train.image_size(0.0, 0.0) == 32


def test_lr_factor():
    assert train.lr_factor(0.125, 0.25) == pytest.approx(0.5)
    assert train.lr_factor(0.25, 0.25) == pytest.approx(1.0)
    assert train.lr_factor(0.625, 0.25) == pytest.approx(0.5)
    assert train.lr_factor(1.0, 0.25) == pytest.approx(0.0)
    assert train.lr_factor(0.0, 0.0) == pytest.approx(1.0)


def test_the_loss_that_is_logged_has_no_label_smoothing():
    """Without an update, the loss of an epoch is that of the network as it is."""
    torch.manual_seed(0)
    network = model.build_network("gated")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.training = 0.0, False
            module.train = lambda mode, module=module: module  # keeps the running statistics in use
    loader = make_loader(make_split(20), batch_size=60)
    recipe = dataclasses.replace(train.RECIPES["fast"], low_resolution_share=0.0, amp_bf16=False)
    loss = train.train_one_epoch(network, train.make_step(network, [], [], recipe, [(32, 1.0)]), loader, range(1))
    assert loss == pytest.approx(eval.evaluate(network, Split(loader.images, loader.labels))[1], rel=1e-4)


def test_cuda_graphs(monkeypatch):
    """A stand-in for a GPU: a graph computes what was recorded, with the tensors that it was recorded with."""
    calls, replays = [], []

    def double(images, factor):
        calls.append((images, factor, result := images * factor))
        return result

    class Graph:
        def replay(self):
            images, factor, result = self.recorded
            replays.append(result.copy_(images * factor))

    @contextlib.contextmanager
    def record(graph):
        yield
        graph.recorded = calls[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    graphs, factor = train.CUDAGraphs(double), torch.tensor(2.0)
    for n in range(1, 7):
        for size in (3, 5):
            images = torch.full((2, size), float(n))
            assert torch.equal(graphs(images, factor * n), images * 2 * n)
    assert len(calls) == 2 * 4 and len(replays) == 2 * 3  # of each size three plain calls and a recorded one


def test_a_network_that_cannot_be_recorded(monkeypatch):
    def read(images):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    graphs = train.CUDAGraphs(read)
    graphs.calls.update({(torch.Size([1]),): 3})
    with pytest.raises(UserError, match="operation not permitted.*: use --no-cuda-graphs"):
        graphs(torch.zeros(1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_loss_falls_with_every_optimizer(optimizer, dataset, tmp_path):
    assert train_in(tmp_path, dataset, "--recipe", "fast", "--epochs", "2", "--optimizer", optimizer,
                    "--lr", "0.01") == 0
    losses = [float(row["batch_loss"]) for row in rows_of(tmp_path)]
    assert losses[1] < losses[0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or newer")
def test_muon_is_pytorchs_with_filters_of_norm_1():
    torch.manual_seed(0)
    shapes = [(32, 16, 2, 2), (6, 9), (32, 64, 1, 1), (9, 6), (6, 9), (32, 64)]
    weights, copies = [torch.nn.Parameter(0.1 * torch.ones(shape)) for shape in shapes], []
    for weight in weights:
        copies.append(torch.nn.Parameter(weight.detach().flatten(1).clone()))
    ours = train.Muon(weights, lr=0.1)
    reference = torch.optim.Muon(copies, lr=0.1, weight_decay=0.0, momentum=0.9, ns_steps=3)
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = torch.randn(weight.shape)
            copy.grad = weight.grad.flatten(1).clone()
        ours.step()
        reference.step()
        for copy in copies:
            copy.data /= copy.data.norm(dim=1, keepdim=True)
    assert all(torch.allclose(weight.flatten(1), copy, atol=2e-2) for weight, copy in zip(weights, copies, strict=True))


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_orthogonalize(shape):
    """The singular values come near 1, and the singular vectors stay."""
    torch.manual_seed(0)
    matrices = torch.randn(2, *shape)
    found = train.orthogonalize(matrices, steps=5)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert found.shape == matrices.shape
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.5  # the coefficients leave 0.7 to 1.2
    assert (u @ v - found).norm() < 0.35 * (u @ v).norm()
    assert train.orthogonalize(1e-12 * matrices).norm() < 0.1 * found.norm()  # noise stays small


def test_muon_takes_the_convolutions_and_sgd_all_other_parameters():
    network = model.build_network("gated")
    muon, sgd = train.build_optimizers(network, train.RECIPES["best"])
    counts = [sum(p.numel() for group in optimizer.param_groups for p in group["params"]) for optimizer in (muon, sgd)]
    norms = sum(p.numel() for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    gains = sum(m.gain.numel() for m in network.modules() if getattr(m, "gain", None) is not None)
    assert gains > 0 and counts[1] == norms + gains + 32 * 10 + 10 and sum(counts) == model.count_parameters(network)


class Tied(torch.nn.Module):
    """What students write: a weight that two layers share, one that gets no gradient, a scale, a conv as the last."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.unused = torch.nn.Conv2d(3, 3, 3)
        self.scale = torch.nn.ParameterDict({"weight": torch.ones(1, 3, 1, 1)})
        self.last = torch.nn.Conv2d(3, 10, 1)

    def forward(self, images):
        return self.last(self.scale["weight"] * self.second(self.first(images).relu()).relu()).mean(dim=(2, 3))


def test_muon_takes_each_hidden_convolution_once():
    network = Tied()
    muon, sgd = train.build_optimizers(network, train.RECIPES["fast"])
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(network.first.weight), id(network.unused.weight)}
    assert len(sgd.param_groups[0]["params"]) == 6  # four biases, the scale, the last weight
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    muon.step()
    assert torch.allclose(network.first.weight.flatten(1).norm(dim=1), torch.ones(3))


class View(torch.nn.Module):
    """Flattens by view, as most tutorials do; in channels_last memory that would fail."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.Linear(4096, 10)

    def forward(self, images):
        return self.linear(self.conv(images).relu().view(len(images), -1))


def conv(in_channels: int, out_channels: int, **options) -> list[torch.nn.Module]:
    return [torch.nn.Conv2d(in_channels, out_channels, 3, padding=1, **options), torch.nn.ReLU()]


OWN = {
    "batch norm": model.PlainCNN,
    "no norm": lambda: torch.nn.Sequential(
        *conv(3, 16), torch.nn.MaxPool2d(2), *conv(16, 32), torch.nn.MaxPool2d(4), torch.nn.Flatten(),
        torch.nn.Linear(512, 10)),
    "strides": lambda: torch.nn.Sequential(
        *conv(3, 16, stride=2), *conv(16, 32, stride=2), *conv(32, 32, stride=2), torch.nn.Flatten(),
        torch.nn.Linear(512, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)),
    "report": model.ReportNet, "tied": Tied, "view": View,
    "no convolution": lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)),
    "flips": lambda: model.FlipNet((8, 8, 8), (0, 1, 1)),
}


@pytest.mark.parametrize("recipe", ["fast", "report"])
@pytest.mark.parametrize("name", OWN)
def test_any_network_learns_with_every_recipe(name, recipe, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "mine", OWN[name])
    options = ["--network", "mine", "--recipe", recipe, "--epochs", "4", "--batch-size", "30", "--lr", "0.01"]
    assert train_in(tmp_path, dataset, *options) == 0
    losses = [float(row["train_loss"]) for row in rows_of(tmp_path)]
    assert losses[-1] < losses[0] and losses[-1] < 2.3  # of ten classes, chance is 2.30
    binds = name in ("no norm", "strides", "report", "no convolution", "view")  # its linear layer takes one size
    assert ("no progressive resizing" in capsys.readouterr().out) == (binds and recipe == "fast")


@pytest.mark.parametrize("options, message", [
    (["--epochs", "0"], "epochs is 0.0: it must be above 0"),
    (["--epochs", "1e308"], "epochs is 1e+308: it must be above 0 and at most 10,000"),
    (["--lr", "nan"], "lr is nan: it must be above 0"),
    (["--lr", "inf"], "lr is inf: it must be above 0 and at most 1,000,000"),
    (["--batch-size", "-1"], "batch_size is -1: it must be above 0"),
    (["--warmup-fraction", "1"], "warmup_fraction is 1.0: it must be at least 0 and below 1"),
    (["--weight-decay", "-1"], "weight_decay is -1.0: it must be 0 or more"),
    (["--crop-padding", "32"], "crop_padding is 32: it must be from 0 to 31"),
    (["--optimizer", "magic"], "optimizer is 'magic': it must be sgd, adamw or muon"),
    (["--network", "wide"], "model.py has no network 'wide': it has plain, report, gated"),
    (["--recipe", "fast", "--weight-decay", "0.1"], "weight_decay is 0.1: it must be 0 with muon"),
    (["--seed", "-1"], "--seed is -1: it must be from 0 to 2**31 - 1"),
    (["--calibrate", "0"], "--calibrate is 0.0: it must be from 0.01 to 100"),
    (["--teachers", "none*.pkl"], "there is no file none*.pkl"),
])
def test_bad_values_are_one_sentence_that_names_the_value(options, message, dataset, tmp_path, capsys):
    assert train_in(tmp_path / "run", dataset, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()  # no empty directory stays behind
    (tmp_path / "run").mkdir()
    assert train_in(tmp_path / "run", dataset, *options) == 2 and (tmp_path / "run").exists()  # unless it was there


@pytest.mark.parametrize("options, message", [
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--dropout", "0.1"], "unrecognized arguments: --dropout"),
    (["--recipe", "none"], "invalid choice: 'none'"),
])
def test_bad_options(options, message, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train_in(tmp_path, dataset, *options)
    assert exit.value.code == 2 and message in capsys.readouterr().err
