"""train.py: what a run leaves behind, resuming, what a run must not replace, the optimisation, the options."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_split
from PIL import Image

import eval
import model
import train
from data import Split, TrainLoader, load_training_data

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
    result = json.loads((finished / "result.json").read_text())
    assert result["accuracy"] == float(rows[-1]["test_accuracy"]) and result["loss"] == float(rows[-1]["test_loss"])
    assert {"recipe", "seed", "lr", "torch", "torchvision", "python", "device", "threads", "seconds"} <= result.keys()
    assert Image.open(finished / "accuracy.png").size == Image.open(finished / "loss.png").size


def test_it_learns(finished):
    rows = rows_of(finished)
    assert float(rows[-1]["test_accuracy"]) > 60  # ten classes: chance is 10
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


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
    assert "180 training images, augmented to 540; 20 held-out images\n" in out
    assert "device cpu" in out and "threads" in out and "\r" not in out
    assert out.count("epoch  train loss") == 1 and "val acc" in out
    assert rows_of(tmp_path)[0].keys() >= {"val_loss", "val_accuracy"}


def test_replaced_weights(copied, dataset, capsys):
    """The output says that they are replaced, and does not suggest git for files that git may not track."""
    assert train_in(copied, dataset, "--epochs", "1", "--seed", "4") == 0
    out = capsys.readouterr().out
    assert f"weights to {copied / 'weights.pkl'} (replaced at the end)" in out and "git" not in out


@pytest.mark.parametrize("options, message", [((), "test set"), (("--validate",), "held-out images")])
def test_plots_need_only_the_log(options, message, finished, dataset, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    folder = tmp_path / "run"
    folder.mkdir()
    if options:
        assert train_in(folder, dataset, "--epochs", "1", *options) == 0
        (folder / "result.json").unlink()
    else:
        (folder / "metrics.csv").write_bytes((finished / "metrics.csv").read_bytes())
    labels = []
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *args, label: labels.append(label))
    monkeypatch.setattr(Axes, "legend", lambda axes: None)
    assert train.main(["--plots-only", "--run-dir", str(folder)]) == 0
    assert labels == 2 * ["5,000 training images", message]
    assert Image.open(folder / "accuracy.png").size > (300, 300) and (folder / "loss.png").exists()


@pytest.mark.parametrize("contents", [None, "", "epoch,loss\n1,2\n", "not a log", "epoch,test_loss\n1,x\n"])
def test_plots_of_no_log(contents, tmp_path, capsys):
    if contents is not None:
        (tmp_path / "metrics.csv").write_text(contents)
    assert train.main(["--plots-only", "--run-dir", str(tmp_path)]) == 2
    assert "is not the log of a run" in capsys.readouterr().err


def test_an_infinite_loss(dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--lr", "1e30", "--epochs", "2") == 2
    assert "try a smaller --lr" in capsys.readouterr().err


def test_a_part_of_a_pass(dataset, tmp_path):
    assert train_in(tmp_path, dataset, "--epochs", "1.5") == 0
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "1.5"]


def test_training_without_the_random_forms(dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--epochs", "1", "--set", "random_forms=False") == 0
    assert "200 training images; 100 test images\n" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_run_of_one_step_trains(recipe, dataset, tmp_path):
    """The learning rate is not zero at the last step."""
    assert train_in(tmp_path, dataset, "--recipe", recipe, "--epochs", "0.01") == 0
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["0.01"] and float(rows_of(tmp_path)[0]["lr"]) > 0
    torch.manual_seed(0)
    initial = model.build_network(train.RECIPES[recipe].network)
    trained, _ = model.load_weights(tmp_path / "weights.pkl")
    assert not torch.equal(initial.features[0].weight, trained.features[0].weight)


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
def test_ctrl_c_says_how_to_resume(python, dataset, tmp_path):
    process = start(python, tmp_path, dataset, "--epochs", "50")
    wait_for_line(process, "    1  ")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
    assert len(model.load_archive(tmp_path / "checkpoint.pt", train.CHECKPOINT, "")["history"]) >= 1


def test_resuming_a_finished_run_changes_nothing(copied, finished, dataset):
    (copied / "weights.pkl").unlink()
    assert train_in(copied, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(copied, finished)


def test_resume_without_a_checkpoint(dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--resume") == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("options, difference", [
    (["--epochs", "4"], "epochs was 3.0, is 4.0"),
    (["--epochs", "3", "--seed", "1"], "seed was 0, is 1"),
    (["--epochs", "3", "--set", "dropout=0"], "dropout was 0.2, is 0.0"),
    (["--epochs", "3", "--validate"], "validate was False, is True"),
])
def test_resume_with_other_settings(options, difference, copied, dataset, capsys):
    assert train_in(copied, dataset, "--resume", *options) == 2
    error = capsys.readouterr().err
    assert difference in error and error.count("\n") == 1


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
    options = ("--recipe", "fast", "--lr", "0.02")
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, *options)
    assert float(rows_of(whole)[-1]["test_accuracy"]) > 60  # ten classes: chance is 10
    assert_same_runs(whole, parts)
    assert train_in(tmp_path, dataset, *options, "--epochs", "2", "--set", "resample=False") == 0
    losses, fixed = ([row["batch_loss"] for row in rows_of(folder)] for folder in (whole, tmp_path))
    assert losses[0] == fixed[0] and losses[1] != fixed[1]  # the second epoch has other draws


# --- what a run must not replace ------------------------------------------------------------------

def test_an_unfinished_run_is_not_replaced(unfinished, finished, dataset, capsys):
    before = (unfinished / "checkpoint.pt").read_bytes()
    assert train_in(unfinished, dataset, "--epochs", "3") == 2
    error = capsys.readouterr().err
    assert "holds an unfinished run, 1 of 3 epochs done" in error and error.count("\n") == 1
    assert "--resume" in error and "--overwrite" in error
    assert (unfinished / "checkpoint.pt").read_bytes() == before
    assert train_in(unfinished, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(unfinished, finished)


def test_overwrite_replaces_an_unfinished_run(unfinished, dataset):
    assert train_in(unfinished, dataset, "--epochs", "1", "--seed", "5", "--overwrite") == 0
    assert json.loads((unfinished / "result.json").read_text())["seed"] == 5


def test_a_damaged_checkpoint_is_not_replaced_either(unfinished, dataset, capsys):
    (unfinished / "checkpoint.pt").write_bytes(b"damaged")
    assert train_in(unfinished, dataset, "--epochs", "3") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_fresh_start_removes_what_a_finished_run_left(copied, dataset, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_epoch", interrupt)
    assert train_in(copied, dataset, "--epochs", "3") == 130
    assert {path.name for path in copied.iterdir()} - {"lock"} == {"weights.pkl"}


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
    (["--lr", "0.01", "--set", "dropout=0"], "report-20ep-seed0-lr=0.01-dropout=0.0"),
    (["--batch-size", "100"], "report-20ep-seed0-batch_size=100"),
    (["--teachers", "runs/a/weights.pkl", "b.pkl"], "report-20ep-seed0-a_weights-b"),
    (["--validate"], "report-20ep-seed0-validate"),
])
def test_each_variant_has_a_directory_of_its_own(options, name, tmp_path, monkeypatch):
    used = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda args, recipe, run_dir, out: used.append(run_dir))
    assert train.main(["--recipe", "report", *options]) == 0
    assert used == [Path("runs") / name]


def test_validation_does_not_replace_the_weights(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data-dir", str(dataset), "--epochs", "1", "--validate", *QUICK]) == 0
    assert not (tmp_path / "weights.pkl").exists()
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "weights.pkl").exists()


@pytest.mark.parametrize("file, epoch", [("checkpoint.pt", 1), ("metrics.csv", 1), ("weights.pkl", 3)])
def test_a_full_disk(file, epoch, finished, dataset, tmp_path, monkeypatch, capsys):
    """One sentence says which file, that the run is safe, and how to continue; and it is safe."""
    write, writes = Path.write_bytes, []

    def fill_the_disk(path, contents):
        writes.append(path.name.startswith(file))
        if path.name.startswith(file) and sum(writes) > (file != "weights.pkl"):
            raise OSError(28, "No space left on device")
        return write(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_the_disk)
        assert train_in(tmp_path, dataset, "--epochs", "3") == 2
    error = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path / file}'" in error and error.count("\n") == 1
    assert f"the run is safe up to epoch {epoch}, continue with --resume" in error
    assert not list(tmp_path.glob("*.part"))
    assert train_in(tmp_path, dataset, "--epochs", "3", "--resume") == 0
    assert_same_runs(finished, tmp_path)


def test_a_full_disk_in_the_first_epoch(dataset, tmp_path, monkeypatch, capsys):
    def fill_the_disk(path, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    assert train_in(tmp_path, dataset, "--epochs", "1") == 2
    error = capsys.readouterr().err
    assert error == f"error: [Errno 28] No space left on device: '{tmp_path / 'metrics.csv'}'\n"


@pytest.mark.parametrize("option", ["--run-dir", "--out"])
def test_places_that_cannot_be_written(option, dataset, tmp_path, capsys):
    (tmp_path / "file").touch()
    places = {"--run-dir": tmp_path / "run", "--out": tmp_path / "weights.pkl", option: tmp_path / "file" / "x"}
    words = [str(word) for pair in places.items() for word in pair]
    assert train.main(["--data-dir", str(dataset), *words, *QUICK]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_directory_as_out(dataset, tmp_path, capsys):
    assert train.main(["--data-dir", str(dataset), "--run-dir", str(tmp_path), "--out", str(tmp_path), *QUICK]) == 2
    assert "cannot be written: name another file with --out" in capsys.readouterr().err


# --- distillation ---------------------------------------------------------------------------------

def test_a_distilled_network_learns_from_its_teachers_alone(finished, dataset, tmp_path, monkeypatch):
    """No label is used: a student whose teacher shifts all classes by one learns the shifted ones."""
    teacher, metadata = model.load_weights(finished / "weights.pkl")
    last = teacher.classifier[2]
    last.weight.data, last.bias.data = last.weight.data.roll(1, dims=0), last.bias.data.roll(1, dims=0)
    model.save_weights(tmp_path / "teacher.pkl", teacher, metadata)
    options = ("--recipe", "fast", "--lr", "0.02", "--teachers", str(tmp_path / "teacher.pkl"))
    whole, parts = whole_and_in_parts(dataset, tmp_path, monkeypatch, *options)
    assert_same_runs(whole, parts)
    assert float(rows_of(whole)[-1]["test_accuracy"]) < 5
    student, _ = model.load_weights(whole / "weights.pkl")
    _, test = load_training_data(dataset)
    assert eval.evaluate(student, Split(test.images, (test.labels + 1) % 10))[0] > 60
    result = json.loads((whole / "result.json").read_text())
    assert result["teachers"] == ["network report, recipe report, 3 epochs, seed 0"]
    assert result["label_smoothing"] == 0.0  # the recipe's 0.1 has no effect with teachers


def test_teachers_that_have_seen_the_held_out_images(finished, dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--validate", "--teachers", str(finished / "weights.pkl")) == 2
    assert "has seen the held-out images" in capsys.readouterr().err


def test_the_teachers_take_turns():
    """A student that is not updated has the cross-entropy with one teacher in the even steps, the other in the odd."""
    torch.manual_seed(0)
    student = model.build_network("report", dropout=0.0)
    teachers = [lambda images, k=k: torch.full((len(images), 10), 0.1).lerp(torch.eye(10)[k], 0.8).log()
                for k in (3, 7)]
    loader = TrainLoader(make_split(20), batch_size=30)
    recipe = dataclasses.replace(train.RECIPES["report"], dropout=0.0, amp_bf16=False)
    loss = train.train_one_epoch(student, teachers, loader, [], recipe, range(2), 2)
    expected = [F.cross_entropy(student(images), teacher(images).exp()).item()
                for (images, _), teacher in zip(loader, teachers, strict=True)]
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-4) and abs(expected[0] - expected[1]) > 1e-2


# --- calibration ----------------------------------------------------------------------------------

def test_the_temperature_that_fits():
    torch.manual_seed(0)
    logits = 3 * torch.randn(20_000, 10)
    labels = torch.multinomial((logits / 1.5).softmax(dim=1), 1)[:, 0]
    assert train.fit_temperature(logits.log_softmax(dim=1), labels) == pytest.approx(1.5, abs=0.05)


def test_a_temperature_is_folded_into_the_weights(finished, copied, dataset):
    """After the last epoch, so it can still be chosen when the run is finished."""
    assert train_in(copied, dataset, "--epochs", "3", "--set", "temperature=2", "--resume") == 0
    before, after = (model.load_weights(folder / "weights.pkl")[0] for folder in (finished, copied))
    images = torch.randn(8, 3, 32, 32)
    assert torch.allclose(after(images), (before(images) / 2).log_softmax(dim=1), atol=1e-5)
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (finished, copied))
    assert after["accuracy"] == before["accuracy"] and after["loss"] != before["loss"]


def test_a_run_with_validate_prints_the_temperature(dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, "--epochs", "0.1", "--validate") == 0
    assert re.search(r"^the loss is least with --set temperature=[012]\.\d+$", capsys.readouterr().out, re.MULTILINE)


# --- optimisation and options ---------------------------------------------------------------------

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
    loader = TrainLoader(make_split(20), batch_size=60)
    recipe = dataclasses.replace(train.RECIPES["fast"], low_resolution_share=0.0, amp_bf16=False)
    loss = train.train_one_epoch(network, [], loader, [], recipe, range(1), 1)
    assert loss == pytest.approx(eval.evaluate(network, Split(loader.images, loader.labels))[1], rel=1e-4)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_the_loss_falls_with_every_optimizer(optimizer, dataset, tmp_path):
    assert train_in(tmp_path, dataset, "--recipe", "fast", "--epochs", "2", "--set", f"optimizer={optimizer}",
                    "--lr", "0.01") == 0
    losses = [float(row["batch_loss"]) for row in rows_of(tmp_path)]
    assert losses[1] < losses[0]


def test_batched_muon_is_pytorchs_with_filters_of_norm_1():
    torch.manual_seed(0)
    shapes = [(32, 64), (6, 9), (32, 64), (9, 6), (6, 9), (32, 64)]
    matrices, copies = ([torch.nn.Parameter(0.1 * torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "ns_steps": 3}
    batched, reference = train.BatchedMuon(matrices, **options), torch.optim.Muon(copies, **options)
    for _ in range(3):
        for matrix, copy in zip(matrices, copies, strict=True):
            matrix.grad = torch.randn(matrix.shape)
            copy.grad = matrix.grad.clone()
        batched.step()
        reference.step()
        for copy in copies:
            copy.data /= copy.data.norm(dim=1, keepdim=True)
    assert all(torch.allclose(matrix, copy, atol=1e-3) for matrix, copy in zip(matrices, copies, strict=True))
    reference.load_state_dict(batched.state_dict())  # the state has the same layout


def test_muon_takes_the_convolutions_and_sgd_all_other_parameters():
    network = model.build_network("gated")
    muon, sgd = train.build_optimizers(network, train.RECIPES["best"])
    counts = [sum(p.numel() for group in optimizer.param_groups for p in group["params"]) for optimizer in (muon, sgd)]
    norms = sum(p.numel() for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    gains = sum(m.gain.numel() for m in network.modules() if getattr(m, "gain", None) is not None)
    assert gains > 0 and counts[1] == norms + gains + 32 * 10 + 10 and sum(counts) == model.count_parameters(network)


@pytest.mark.parametrize("recipe", train.RECIPES.values(), ids=train.RECIPES)
def test_every_recipe_is_within_the_limit(recipe):
    network = model.build_network(recipe.network, dropout=recipe.dropout)
    assert model.count_parameters(network) <= model.PARAMETER_LIMIT


@pytest.mark.parametrize("options, message", [
    (["--epochs", "0"], "epochs is 0.0: it must be above 0"),
    (["--set", "epochs=inf"], "epochs is inf: it must be above 0"),
    (["--lr", "nan"], "lr is nan: it must be above 0"),
    (["--batch-size", "-1"], "batch_size is -1: it must be above 0"),
    (["--set", "warmup_fraction=1"], "warmup_fraction is 1.0: it must be at least 0 and below 1"),
    (["--set", "dropout=-0.1"], "dropout is -0.1: it must be at least 0 and below 1"),
    (["--set", "weight_decay=-1"], "weight_decay is -1.0: it must be 0 or more"),
    (["--set", "crop_padding=33"], "crop_padding is 33: it must be from 0 to 32"),
    (["--set", "optimizer=magic"], "optimizer is 'magic': it must be one of sgd, adamw, muon"),
    (["--set", "network=wide"], "network is 'wide': it must be one of report, gated"),
    (["--recipe", "fast", "--set", "weight_decay=0.1"], "weight_decay is 0.1: it must be 0 with muon"),
    (["--set", "optimizer=muon", "--set", "weight_decay=0"],
     "optimizer is 'muon': it needs a flip-equivariant network, not 'report'"),
    (["--seed", "-1"], "--seed is -1: it must be from 0 to 2**31 - 1"),
    (["--teachers", "none.pkl"], "there is no file none.pkl"),
])
def test_bad_values_are_one_sentence_that_names_the_value(options, message, dataset, tmp_path, capsys):
    assert train_in(tmp_path, dataset, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("options, message", [
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--set", "size=3"], "a recipe has no field 'size'"),
    (["--set", "dropout=much"], "dropout takes float values, not 'much'"),
    (["--set", "amp_bf16=yes"], "amp_bf16 takes bool values, not 'yes'"),
    (["--recipe", "none"], "invalid choice: 'none'"),
])
def test_bad_options(options, message, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train_in(tmp_path, dataset, *options)
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("script, options", [(train, ["--epochs", "0"]), (eval, ["--weights", "none.pkl"])])
def test_both_scripts_reuse_freed_memory(script, options, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "reuse_freed_memory", lambda: calls.append(script))
    assert script.main(options) == 2 and calls == [script]
