"""Train a CIFAR-10 classifier of at most 50,000 parameters and save its weights.

    python train.py                               recipe "fast": minutes on two CPU cores -> weights.pkl
    python train.py --out runs/mine.pkl           the same, and weights.pkl stays as it is
    python train.py --epochs 1                    less time, or more: the learning rate schedule stretches
    python train.py --network plain               another network of model.py, or your own
    python train.py --recipe quick                about 80 % in a minute or two
    python train.py --recipe report               the report's network and settings
    python train.py --recipe best                 hours, for accuracy
    python train.py --recipe best --teachers A B  distillation from the networks saved in A and B
    python train.py --validate                    hold out 5,000 training images and measure on them
    python train.py --resume                      continue an interrupted run

A run leaves weights.pkl, metrics.csv, accuracy.png, loss.png, result.json and checkpoint.pt in its directory.
"""

import argparse
import copy
import dataclasses
import glob
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import Timeout
from torch import nn

import model
from data import (
    DEFAULT_DATA_DIR, Split, TrainLoader, UserError, hold_lock, image_size, load_training_data, normalize, one_line,
    resize)
from eval import (
    accuracy_and_loss, check_writable, describe_machine, evaluate, has_bf16, infer, path_option, pick_device, run_script, say)

# --- recipes --------------------------------------------------------------------------------------

OPTIMIZERS = ("sgd", "adamw", "muon")
RULES = {
    "a network of model.py": lambda value: value in model.NETWORKS,
    f"one of {', '.join(OPTIMIZERS)}": lambda value: value in OPTIMIZERS,
    "above 0": lambda value: 0 < value < math.inf,
    "0 or more": lambda value: 0 <= value < math.inf,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "from 0 to 32": lambda value: 0 <= value <= 32,
    "true or false": lambda value: value in (True, False),
}


def setting(rule: str, help: str, default=dataclasses.MISSING):
    return dataclasses.field(default=default, metadata={"rule": rule, "help": help})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a run, except its seed and its teachers. Raises UserError for a bad value."""

    network: str = setting("a network of model.py", "a name in model.NETWORKS")
    # optimisation
    epochs: float = setting("above 0", "passes through the augmented training set; the last may be partial")
    batch_size: int = setting("above 0", "samples per step")
    optimizer: str = setting(f"one of {', '.join(OPTIMIZERS)}", "sgd, adamw, or muon for the convolutions with sgd")
    lr: float = setting("above 0", "peak learning rate; with muon, of the convolutions (of the rest: 0.1)")
    weight_decay: float = setting("0 or more", "of sgd and adamw; 0 with muon")
    warmup_fraction: float = setting("at least 0 and below 1", "share of the steps in which the learning rate rises")
    # regularisation
    label_smoothing: float = setting("at least 0 and below 1", "arXiv 1512.00567; unused with teachers", 0.0)
    # augmentation: see data.TrainLoader
    random_versions: bool = setting("true or false", "add two random versions of each image", True)
    resample: bool = setting("true or false", "draw the random versions anew in each epoch, not once", False)
    autoaugment_group_size: int = setting("above 0", "images that share a draw of AutoAugment, for speed", 1)
    autoaugment_flipped: bool = setting("true or false", "AutoAugment for the flipped version too", False)
    crop_padding: int = setting("from 0 to 32", "pixels of padding for a random crop of each sample", 0)
    # speed
    low_resolution_share: float = setting("at least 0 and below 1", "share of the steps on small images", 0.0)
    amp_bf16: bool = setting("true or false", "bfloat16 autocast, where the hardware computes in bfloat16", True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata["rule"]
            if not RULES[rule](value):
                raise UserError(f"{field.name} is {value!r}: it must be {rule}")
        if self.weight_decay and self.optimizer == "muon":
            raise UserError(f"weight_decay is {self.weight_decay}: it must be 0 with muon")


RECIPES = {
    # epochs, batch size, learning rate and network are the report's; it names no optimizer and no schedule
    "report": Recipe(
        network="report", epochs=20, batch_size=250, optimizer="adamw", lr=0.03, weight_decay=0.0, warmup_fraction=0.1),
    # high accuracy in minutes; docs/notes.md tells how the values were chosen
    "fast": Recipe(
        network="gated", epochs=2, batch_size=128, optimizer="muon", lr=0.03, weight_decay=0.0, warmup_fraction=0.15,
        label_smoothing=0.1, resample=True, autoaugment_group_size=16, crop_padding=2, low_resolution_share=0.3),
}
RECIPES["quick"] = dataclasses.replace(  # about 80 % as soon as possible; so short a run memorises little
    RECIPES["fast"], epochs=1, batch_size=64, lr=0.05, warmup_fraction=0.3, random_versions=False, crop_padding=0)
RECIPES["best"] = dataclasses.replace(  # for long runs, with or without teachers
    RECIPES["fast"], network="gated32", epochs=40, autoaugment_flipped=True, crop_padding=4)


# --- optimisation ---------------------------------------------------------------------------------

def orthogonalize(updates: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """Replace the singular values of each matrix by about 1: (K, rows, columns) -> the same.

    Newton-Schulz iteration in bfloat16, with the coefficients of Jordan et al. 2024
    (kellerjordan.github.io/posts/muon). Three steps, rather than their five, are close enough to 1 here.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = updates.shape[1] > updates.shape[2]
    x = updates.mT.bfloat16() if is_tall else updates.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised update for the weight of each layer, flattened to a matrix (rows are filters).

    So all directions of a matrix are learned at one rate. In a group with `unit_filters`, each filter is rescaled to
    norm 1 after the step (Karras et al. 2024, arXiv 2312.02696): the learning rate is the relative size of an update,
    no filter grows or dies, and no weight decay is needed.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}  # equal shapes are orthogonalised together, for speed
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
            for (rows, columns), weights in by_shape.items():
                updates = torch.stack([self.nesterov_update(weight, group["momentum"]).flatten(1) for weight in weights])
                step_size = group["lr"] * max(1, rows / columns) ** 0.5
                for weight, update in zip(weights, orthogonalize(updates), strict=True):
                    weight.sub_(update.view_as(weight), alpha=step_size)
                    weight.copy_(F.normalize(weight.flatten(1)).view_as(weight))

    def nesterov_update(self, weight: nn.Parameter, momentum: float) -> torch.Tensor:
        buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def build_optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD, AdamW, or Muon for the weights of the convolutions with SGD for all other parameters."""
    sgd = {"momentum": 0.9, "nesterov": True}
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, **sgd)]
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)]
    weights = [getattr(module, "weight", None) for module in network.modules()]
    kernels = {weight for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 4}
    others = [parameter for parameter in network.parameters() if parameter not in kernels]
    return [Muon([p for p in network.parameters() if p in kernels], recipe.lr), torch.optim.SGD(others, 0.1, **sgd)]


def lr_factor(progress: float, warmup_fraction: float) -> float:
    """The share of the peak learning rate after a share `progress` of the steps: linear warm-up, then half a
    cosine to zero (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    if progress < warmup_fraction:
        return progress / warmup_fraction
    return (1 + math.cos(math.pi * (progress - warmup_fraction) / (1 - warmup_fraction))) / 2


# --- training -------------------------------------------------------------------------------------

def batch_losses(
    network: nn.Module, teacher: nn.Module | None, images: torch.Tensor, labels: torch.Tensor, size: int,
    recipe: Recipe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its summed cross-entropy without label smoothing, for the log.

    The probabilities of a teacher, if there is one, replace the labels (Hinton et al. 2015, arXiv 1503.02531). The
    teacher sees images of 32x32, the network images of `size`.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.amp_bf16):
        logits = network(resize(images, size)).float()
        with torch.no_grad():
            targets = teacher(images).float().softmax(dim=1) if teacher else labels
    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    return loss, F.cross_entropy(logits.detach(), targets, reduction="sum")


def train_one_epoch(
    network: nn.Module, teachers: list[nn.Module], loader: TrainLoader, optimizers: list[torch.optim.Optimizer],
    recipe: Recipe, steps: range, total_steps: int, after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """One pass through `loader`, or a part of it: `steps` are its step numbers, out of the run's `total_steps`.

    The teachers take turns, one a batch: cheaper than their mean, which is the expected target. Returns the mean
    cross-entropy with the targets of the training, without label smoothing.
    """
    losses, samples = [], 0  # tensors: reading a number stalls a GPU
    network.train()
    for step, (images, labels) in zip(steps, loader, strict=False):  # the last epoch may be partial
        progress = (step + 0.5) / total_steps  # half a step in: the learning rate is never zero
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor(progress, recipe.warmup_fraction)
        teacher = teachers[step % len(teachers)] if teachers else None
        size = image_size(progress, recipe.low_resolution_share)
        loss, summed = batch_losses(network, teacher, images, labels, size, recipe)
        network.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(summed)
        samples += len(labels)
        after_step(step)
    return torch.stack(losses).sum().item() / samples


def rehearse(
    network: nn.Module, teachers: list[nn.Module], loader: TrainLoader, recipe: Recipe,
) -> dict[int, float]:
    """The seconds of a training step for each image size that the network takes, tried on a copy of it.

    So a network that fails does so before the first step. Raises UserError for one that fails at 32x32.
    """
    network, teacher, seconds = copy.deepcopy(network).train(), teachers[0] if teachers else None, {}
    images, labels = normalize(loader.images[: recipe.batch_size]), loader.labels[: recipe.batch_size]
    for size in (32, 24, 16) if recipe.low_resolution_share else (32,):
        try:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                loss, _ = batch_losses(network, teacher, images, labels, size, recipe)
                loss.backward()
                loss.item()  # waits for a GPU
                times.append(time.perf_counter() - start)
            infer(network, loader.images[:2])
        except Exception as error:  # whatever the code of the network raises
            if size < 32:
                break
            raise UserError(f"network {recipe.network!r} cannot be trained ({one_line(error)}): mend it") from error
        seconds[size] = min(times)
    return seconds


class Progress:
    """Shows how far a run is, and how long it will take: on a terminal in place, in a log file now and then.

    Args:
        costs: the seconds of each step of the run, as rehearsed. Only their ratios count: a step takes as long,
            in proportion, as the steps so far.
        steps_per_epoch: steps of a whole epoch.
    """

    def __init__(self, costs: list[float], steps_per_epoch: int):
        self.costs, self.steps_per_epoch = costs, steps_per_epoch
        self.seconds = self.cost = 0.0  # of the steps of this sitting
        self.rest, self.epochs = 0.0, 0  # seconds for augmentation and evaluation, in so many epochs
        self.last = self.shown = time.perf_counter()
        self.interval = 60  # seconds between two lines in a log file: the first soon, the others rarer

    def left(self, step: int) -> str:
        """The time left before step number `step`, as h:mm:ss."""
        seconds = sum(self.costs[step:]) * self.seconds / self.cost if self.cost else 0.0
        epochs = math.ceil((len(self.costs) - step) / self.steps_per_epoch)
        minutes, seconds = divmod(round(seconds + epochs * self.rest / max(1, self.epochs)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def after_step(self, step: int) -> None:
        now, at = time.perf_counter(), step % self.steps_per_epoch
        if at == 0:  # the first batch waits for the augmentation
            self.rest += now - self.last
        else:
            self.seconds, self.cost = self.seconds + now - self.last, self.cost + self.costs[step]
        self.last = now
        is_terminal = sys.stdout.isatty()
        if at % 10 == 9 if is_terminal else now - self.shown > self.interval:
            line = f"      step {at + 1} of {self.steps_per_epoch}, {self.left(step + 1)} left"
            say(f"\r{line}\r" if is_terminal else line, end="" if is_terminal else "\n")
            self.shown, self.interval = now, 600

    def after_epoch(self) -> None:
        now = time.perf_counter()
        self.rest, self.epochs = self.rest + now - self.last, self.epochs + 1
        self.last = self.shown = now


# --- what a run leaves behind ---------------------------------------------------------------------

TRAIN_SAMPLE = 5_000  # training images, not augmented, that the network is measured on after each epoch
CHECKPOINT = {"settings", "history", "sittings", "network", "optimizers"}


def draw_graph(history: list[dict], quantity: str, title: str) -> bytes:
    """The accuracy or the loss per epoch, of training images and of those held out or the test set, as a PNG file."""
    from matplotlib.figure import Figure  # slow to import, and needed only here

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    labels = {"train": f"{TRAIN_SAMPLE:,} training images", "val": "held-out images", "test": "test set"}
    for prefix, label in labels.items():
        if any(f"{prefix}_{quantity}" in row for row in history):
            axes.plot([row["epoch"] for row in history], [row[f"{prefix}_{quantity}"] for row in history], ".-",
                      label=label)
            axes.legend()
    axes.set(xlabel="epoch (values at its end)", title=title,
             ylabel="accuracy (%)" if quantity == "accuracy" else "loss (cross-entropy)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    figure.savefig(file := io.BytesIO(), dpi=120)
    return file.getvalue()


def check_free(directory: Path) -> None:
    """Raise UserError if the directory holds a run, or files that are not a run's."""
    names = {path.name for path in directory.iterdir() if path.suffix != ".part"} - {"lock"}
    if "result.json" in names:
        raise UserError(f"{directory} holds a finished run: replace it with --overwrite, or name another "
                        "directory with --run-dir")
    if "checkpoint.pt" in names:
        saved = model.load_archive(directory / "checkpoint.pt", CHECKPOINT, "replace it with --overwrite")
        raise UserError(
            f"{directory} holds an unfinished run, {saved['history'][-1]['epoch']:g} of "
            f"{saved['settings']['epochs']:g} epochs done: continue it with --resume, or replace it with --overwrite")
    if names:
        raise UserError(f"{directory} holds other files ({', '.join(sorted(names)[:3])}): name another directory "
                        "with --run-dir, or write there with --overwrite")


def what_is_safe(directory: Path) -> str:
    """What to do after an interruption, and what of the run is kept."""
    path = directory / "checkpoint.pt"
    if not path.exists():
        return "no epoch is finished, so nothing is kept; give the same command again"
    epoch = model.load_archive(path, CHECKPOINT, "start again with --overwrite")["history"][-1]["epoch"]
    return f"the run is safe up to epoch {epoch:g}; continue it with the same command and --resume"


class Run:
    """The directory of a run: its log, graphs and checkpoint, which grow with each epoch, then its weights.

    Attributes:
        settings: all that decides the result; a run is resumed with the same settings only.
        history: a row of numbers for each epoch.
        sittings: the machine and the seconds of each stretch of the run, since it may be interrupted and moved.
    """

    def __init__(self, directory: Path, settings: dict, machine: dict):
        self.directory, self.settings, self.history = directory, settings, []
        self.sittings, self.start, self.can_draw = [machine | {"epochs": 0, "seconds": 0.0}], time.perf_counter(), True
        self.draw()  # what fails is said before the first step

    def restore(self, network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Go on where the run in the directory stopped. Raises UserError if there is none, or one of other settings."""
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            raise UserError(f"{self.directory} holds no finished epoch to continue from: leave out --resume")
        checkpoint = model.load_archive(path, CHECKPOINT, "start again with --overwrite")
        saved = checkpoint["settings"]
        changes = [f"{name} was {saved.get(name)}, is {self.settings.get(name)}"
                   for name in sorted(self.settings | saved) if saved.get(name) != self.settings.get(name)]
        if changes:
            raise UserError(
                f"{self.directory} holds another run ({', '.join(changes)}): give its options, or another --run-dir")
        network.load_state_dict(checkpoint["network"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.history, self.sittings = checkpoint["history"], checkpoint["sittings"] + self.sittings

    def save_epoch(self, row: dict, network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        if not self.history:  # now there is something to put in the place of an older run
            for name in ("result.json", "weights.pkl"):
                (self.directory / name).unlink(missing_ok=True)
        self.history.append(row)
        self.sittings[-1] |= {"epochs": self.sittings[-1]["epochs"] + 1, "seconds": time.perf_counter() - self.start}
        lines = [row, *[row.values() for row in self.history]]
        model.atomic_write(
            self.directory / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        model.save_archive(self.directory / "checkpoint.pt", {
            "settings": self.settings, "history": self.history, "sittings": self.sittings,
            "network": network.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        self.draw()

    def draw(self) -> None:
        """Draw accuracy.png and loss.png; before the first epoch, only try to."""
        try:
            for quantity in ("accuracy", "loss") if self.can_draw else ():
                graph = draw_graph(self.history, quantity, f"CIFAR-10: {self.directory.resolve().name}")
                if self.history:
                    model.atomic_write(self.directory / f"{quantity}.png", graph)
        except Exception as error:  # no reason to lose a run
            self.can_draw = False
            say(f"no graphs are drawn ({one_line(error)}): the run goes on without them")

    def finish(self, network: nn.Module, metadata: dict, result: dict, out: Path | None) -> str:
        """Write weights.pkl, here and at `out`, and result.json. Returns the names of the weights files."""
        paths = dict.fromkeys([self.directory / "weights.pkl", *([out] if out else [])])
        for path in paths:
            model.save_weights(path, network, metadata)
        self.sittings[-1]["seconds"] = time.perf_counter() - self.start
        result = self.settings | result | {"seconds": self.seconds(), "sittings": self.sittings}
        model.atomic_write(self.directory / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        return " and ".join(map(str, paths))

    def seconds(self) -> float:
        return sum(sitting["seconds"] for sitting in self.sittings)


def table_line(row: dict, left: str = "") -> str:
    prefix = "val" if "val_loss" in row else "test"
    return (f"{row['epoch']:5g}  {row['train_loss']:10.4f}  {row['train_accuracy']:8.2f}%  {row[prefix + '_loss']:9.4f}"
            f"  {row[prefix + '_accuracy']:7.2f}%  {row['lr']:8.5f}  {row['seconds']:7.1f}  {left:>9}").rstrip()


# --- calibration ----------------------------------------------------------------------------------

def fit_temperature(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, from 0.5 to 2, with the least loss (temperature scaling: Guo et al. 2017, arXiv 1706.04599)."""
    temperatures = [hundredths / 100 for hundredths in range(50, 201)]
    return min(temperatures, key=lambda t: F.cross_entropy(log_probabilities / t, labels).item())


def divide_logits(network: nn.Module, temperature: float) -> None:
    """Divide the logits of `network` by a number, in the weights of its last layer. UserError if that is not linear."""
    images = torch.randn(2, 3, 32, 32, device=next(network.parameters()).device)
    network.eval()
    with torch.no_grad():
        expected = network(images) / temperature
        last = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        for parameter in last.parameters():
            parameter /= temperature
        if not torch.allclose(network(images), expected, atol=1e-3):
            raise UserError("--calibrate needs a network whose last layer is linear: leave it out")


# --- the run --------------------------------------------------------------------------------------


def train(
    run: Run, recipe: Recipe, network: nn.Module, teachers: list[nn.Module], loader: TrainLoader,
    splits: dict[str, Split], optimizers: list[torch.optim.Optimizer], costs: list[float],
) -> None:
    """Train to the last epoch. `splits` are what is measured after each, under the names of the columns."""
    steps_per_epoch, progress = len(loader), Progress(costs, len(loader))
    for epoch in range(len(run.history), math.ceil(len(costs) / steps_per_epoch)):
        start = time.perf_counter()
        torch.manual_seed(10_000 * loader.seed + epoch)  # for dropout
        loader.set_epoch(epoch)
        steps = range(epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, len(costs)))
        batch_loss = train_one_epoch(
            network, teachers, loader, optimizers, recipe, steps, len(costs), progress.after_step)
        if not math.isfinite(batch_loss):
            raise UserError(f"the loss is {batch_loss} in epoch {epoch + 1}: try a smaller --lr")
        row = {"epoch": min(epoch + 1, recipe.epochs)}
        for prefix, split in splits.items():
            row[f"{prefix}_accuracy"], row[f"{prefix}_loss"] = evaluate(network, split)
        row |= {"batch_loss": batch_loss, "lr": optimizers[0].param_groups[0]["lr"],
                "seconds": time.perf_counter() - start}
        run.save_epoch(row, network, optimizers)
        progress.after_epoch()
        say(table_line(row, progress.left(steps.stop)))


def load_teachers(paths: list[Path], validate: bool, device: torch.device) -> tuple[list[nn.Module], list[str]]:
    """The networks in these weights files, for inference, and how each was trained."""
    loaded = [model.load_weights(path) for path in paths]
    for path, (_, metadata) in zip(paths, loaded, strict=True):
        if validate and not metadata["validate"]:
            raise UserError(f"{path} has seen the held-out images: with --validate, use teachers trained with it")
    return ([model.export(network).to(device, memory_format=torch.channels_last) for network, _ in loaded],
            [model.describe_training(metadata) for _, metadata in loaded])


def run_training(args: argparse.Namespace, recipe: Recipe, run_dir: Path, out: Path | None) -> None:
    """Set up a run, train, and write its result."""
    device = pick_device(args.device)
    teachers, described = load_teachers(args.teachers, args.validate, device)
    if teachers:
        recipe = dataclasses.replace(recipe, label_smoothing=0.0)
    training, test = (split.to(device) for split in load_training_data(args.data_dir, args.validate))
    loader = TrainLoader(training, recipe, args.seed)
    torch.backends.cudnn.deterministic = True  # so that a resumed run equals an uninterrupted one on CUDA too
    torch.manual_seed(args.seed)
    network = model.build_network(recipe.network).to(device)
    divide_logits(copy.deepcopy(network), args.calibrate)  # fails now rather than after the training
    optimizers = build_optimizers(network, recipe)
    bf16 = recipe.amp_bf16 and has_bf16(device)
    computed = dataclasses.replace(recipe, amp_bf16=bf16)
    seconds = rehearse(network, teachers, loader, computed)
    if recipe.low_resolution_share and len(seconds) < 3:
        say(f"network {recipe.network} takes images of 32x32 only: no progressive resizing")
        recipe, computed = (dataclasses.replace(r, low_resolution_share=0.0) for r in (recipe, computed))
    settings = {"recipe": args.recipe, **dataclasses.asdict(recipe), "seed": args.seed, "validate": args.validate,
                "teachers": described}
    run = Run(run_dir, settings, describe_machine(device) | {"bfloat16": bf16})
    if args.resume:
        run.restore(network, optimizers)
    total_steps = max(1, round(recipe.epochs * len(loader)))
    costs = [seconds[image_size((step + 0.5) / total_steps, recipe.low_resolution_share)] for step in range(total_steps)]

    prefix, measured = ("val", "held-out images") if args.validate else ("test", "test images")
    parameters, temperature = model.count_parameters(network), args.calibrate
    say(f"recipe {args.recipe}, seed {args.seed}: network {recipe.network}, {parameters:,} parameters")
    augmented = f", augmented to {len(loader.images):,}" if recipe.random_versions else ""
    say(f"{len(training.images):,} training images{augmented}; {len(test.images):,} {measured}")
    say(f"device {device}, {torch.get_num_threads()} threads, {'bfloat16' if bf16 else 'float32'}")
    say(f"log, graphs and weights go to {run_dir}" + (f", weights to {out} too" if out else "") + "\n")
    say(f"epoch  train loss  train acc  {prefix:>4} loss  {prefix:>4} acc        lr  seconds  time left")
    for row in run.history:
        say(table_line(row))
    train(run, computed, network, teachers, loader,
          {"train": Split(*(tensor[:TRAIN_SAMPLE] for tensor in training)), prefix: test}, optimizers, costs)

    log_probabilities = infer(network, test.images)
    if args.validate:
        say(f"\nthe loss is least with --calibrate {fit_temperature(log_probabilities, test.labels)}")
    divide_logits(network, temperature)
    accuracy, loss = accuracy_and_loss(F.log_softmax(log_probabilities / temperature, dim=1), test.labels)
    files = run.finish(network, {
        "network": recipe.network, "recipe": args.recipe, "seed": args.seed, "epochs": float(recipe.epochs),
        "validate": args.validate, "accuracy": accuracy}, {"parameters": parameters, "calibrate": temperature,
        "accuracy": accuracy, "loss": loss}, out)
    say(f"\n{accuracy:.2f} % of the {len(test.images):,} {measured} after {recipe.epochs:g} epochs and "
        f"{run.seconds() / 60:.1f} minutes; the weights are in {files}")


# --- the command ----------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="fast", help="the settings to start from (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)")
    add("--teachers", type=path_option, nargs="+", default=[], metavar="FILE", help="weights of networks to distil")
    add("--validate", action="store_true", help="hold out the last 5,000 training images and measure on them")
    add("--calibrate", type=float, default=1.0, metavar="T", help="divide the final logits by T, which calibrates "
        "the probabilities; --validate prints the best T (default: 1)")
    add("--out", type=path_option, metavar="FILE", help="the weights (default: weights.pkl; with --validate, none)")
    add("--run-dir", type=path_option, metavar="DIR", help="of the run (default: in runs/, named after the settings)")
    add("--resume", action="store_true", help="continue the run in its directory after its last finished epoch")
    add("--overwrite", action="store_true", help="replace what is in the directory, once the first epoch is done")
    add("--data-dir", type=path_option, default=DEFAULT_DATA_DIR, metavar="DIR",
        help="the data set (default: $CIFAR10_DIR, or data)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: fastest)")
    settings = parser.add_argument_group("settings of a recipe")
    for field in dataclasses.fields(Recipe):
        values = ", ".join(f"{name} {getattr(recipe, field.name)}" for name, recipe in RECIPES.items())
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": "X"}
        settings.add_argument(f"--{field.name.replace('_', '-')}", default=None, **kind,
                              help=f"{field.metadata['help']} ({values})")
    return parser


def expand(paths: list[Path]) -> list[Path]:
    """The files that these names and patterns stand for; not every shell expands patterns."""
    found = []
    for path in paths:
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
        if not matches:
            raise UserError(f"there is no file {path}: name weights that train.py wrote, with --teachers")
        found += matches
    return found


def start_run(args: argparse.Namespace) -> int:
    """Choose the settings and the directory, and run the training in it."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **changes)
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}: it must be from 0 to 2**31 - 1")
    if not 0 < args.calibrate < math.inf:
        raise UserError(f"--calibrate is {args.calibrate}: it must be above 0")
    args.teachers = expand(args.teachers)
    words = [args.recipe, f"{recipe.epochs:g}ep", f"seed{args.seed}",
             *[f"{name}={value}" for name, value in changes.items() if name != "epochs"],
             *["_".join(path.with_suffix("").parts[-2:]) for path in args.teachers]]
    run_dir = args.run_dir or Path("runs") / "-".join(words + ["validate"] if args.validate else words)
    out = args.out or (None if args.validate else Path("weights.pkl"))
    run_dir.mkdir(parents=True, exist_ok=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(out)
    try:
        with hold_lock(run_dir / "lock"):
            if not (args.resume or args.overwrite):
                check_free(run_dir)
            run_training(args, recipe, run_dir, out)
    except Timeout as error:
        raise UserError(f"another process trains in {run_dir}: wait for it, or name another --run-dir") from error
    except OSError as error:  # the disk is full, for example
        raise UserError(f"{error}: {what_is_safe(run_dir)}") from error
    except KeyboardInterrupt:
        print(f"\nstopped: {what_is_safe(run_dir)}", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return run_script(lambda: start_run(args))


if __name__ == "__main__":
    sys.exit(main())
