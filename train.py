"""Train a CIFAR-10 classifier of at most 50,000 parameters and save its weights.

    python train.py                               recipe "fast": minutes on two CPU cores -> weights.pkl
    python train.py --epochs 1                    a shorter or longer run: the learning rate schedule adapts
    python train.py --network plain               another network of model.py, or your own
    python train.py --recipe quick                about 80 % in a minute or two
    python train.py --recipe report               the report's network and settings
    python train.py --recipe best                 for accuracy: hours on a CPU, minutes on a GPU
    python train.py --recipe best --teachers A B  distillation from the networks saved in A and B
    python train.py --validate                    hold out 5,000 training images and measure on them
    python train.py --resume                      continue an interrupted run

After each epoch, the network is measured on 5,000 training images, not augmented, and on the test set. A run leaves
weights.pkl, metrics.csv, accuracy.png, loss.png, result.json and checkpoint.pt in its directory.
"""

import argparse
import collections
import copy
import dataclasses
import datetime
import functools
import glob
import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import time
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import data
import eval
import model
from data import Split, TrainLoader, UserError, one_line, resize, say

# --- recipes --------------------------------------------------------------------------------------

ABOVE_0 = "above 0 and at most 1,000,000", lambda value: 0 < value <= 1_000_000
SHARE = "at least 0 and below 1", lambda value: 0 <= value < 1


def setting(help: str, rule: tuple[str, Callable] = ("", lambda value: True), default=dataclasses.MISSING):
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a run, except seed, teachers, --validate and --calibrate. Raises UserError for a bad value."""

    network: str = setting("a name in model.NETWORKS")
    # optimisation
    epochs: float = setting("passes through the training set with its random versions; need not be whole", (
        "above 0 and at most 10,000", lambda value: 0 < value <= 10_000))
    batch_size: int = setting("samples per step", ABOVE_0)
    optimizer: str = setting("sgd, adamw, or muon for the convolutions and sgd for the rest", (
        "sgd, adamw or muon", lambda value: value in ("sgd", "adamw", "muon")))
    lr: float = setting("peak learning rate; with muon, of the convolutions (of the rest: 0.1)", ABOVE_0)
    weight_decay: float = setting("of sgd and adamw", ("0 or more", lambda value: 0 <= value < math.inf))
    warmup_fraction: float = setting("share of the steps in which the learning rate rises", SHARE)
    averaged_share: float = setting("share of the epochs, the last ones, whose weights are averaged", SHARE, 0.0)
    # regularisation
    label_smoothing: float = setting("as in arXiv 1512.00567; unused with teachers", SHARE, 0.0)
    teachers_per_batch: int = setting("teachers whose mean is the target of a batch; they take turns", ABOVE_0, 1)
    # augmentation: see data.TrainLoader
    random_versions: bool = setting("train on two random versions of each image too", default=True)
    resample: bool = setting("draw the random versions anew for each epoch, not once", default=False)
    autoaugment_group_size: int = setting("images that share a draw of AutoAugment", ABOVE_0, 1)
    autoaugment_flipped: bool = setting("AutoAugment for the flipped version too", default=False)
    crop_padding: int = setting("pixels of padding for a random crop of each sample", (
        "from 0 to 31", lambda value: 0 <= value <= 31), 0)
    black_borders: bool = setting("black where a crop or AutoAugment moves an image; if not, crops reflect it and "
                                  "AutoAugment fills with grey", default=True)
    # speed
    low_resolution_share: float = setting("share of the steps on small images (progressive resizing)", SHARE, 0.0)
    amp_bf16: bool = setting("bfloat16 autocast, where the hardware has it (on a CPU: from PyTorch 2.10 on)",
                             default=True)
    cuda_graphs: bool = setting("on CUDA, record a step and replay it; off for a network whose Python code differs "
                                "between steps", default=True)
    compile: bool = setting("on CUDA, torch.compile: a minute for each image size, then faster steps", default=False)

    def __post_init__(self):
        model.find_network(self.network)
        for field in dataclasses.fields(self):
            value, (rule, is_met) = getattr(self, field.name), field.metadata["rule"]
            if not is_met(value):
                raise UserError(f"{field.name} is {value!r}: it must be {rule}")
        if self.weight_decay and self.optimizer == "muon":
            raise UserError(f"weight_decay is {self.weight_decay}: it must be 0 with muon")


RECIPES = {
    # epochs, batch size and learning rate are the report's; it names no optimizer and no schedule
    "report": Recipe(
        network="report", epochs=20, batch_size=250, optimizer="adamw", lr=0.03, weight_decay=0.0, warmup_fraction=0.1),
    # high accuracy in minutes; the trials behind its values are in docs/trials.csv
    "fast": Recipe(
        network="gated", epochs=2, batch_size=128, optimizer="muon", lr=0.03, weight_decay=0.0, warmup_fraction=0.15,
        label_smoothing=0.1, resample=True, autoaugment_group_size=16, crop_padding=2, low_resolution_share=0.3),
}
RECIPES["quick"] = dataclasses.replace(  # about 80 % as soon as possible; so short a run memorises little
    RECIPES["fast"], epochs=1, batch_size=64, lr=0.05, warmup_fraction=0.3, random_versions=False, crop_padding=0)
RECIPES["best"] = dataclasses.replace(  # for long runs, with or without teachers
    RECIPES["fast"], network="gated32", epochs=60, averaged_share=0.4, autoaugment_group_size=250,
    autoaugment_flipped=True, crop_padding=4, black_borders=False, teachers_per_batch=3)


SPEED = ("cuda_graphs", "compile")  # for speed alone: not in the name of a run, and --resume may change them


# --- optimisation ---------------------------------------------------------------------------------

def orthogonalize(updates: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """Bring the singular values of matrices (K, rows, columns) near 1, by Newton-Schulz iteration in bfloat16, with the
    coefficients of Jordan et al. 2024 (kellerjordan.github.io/posts/muon), who take five steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = updates.shape[1] > updates.shape[2]
    x = F.normalize((updates.mT if is_tall else updates).bfloat16(), dim=(1, 2), eps=1e-7)  # noise stays small
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(updates.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose updates are orthogonalised. Each weight is taken as a matrix whose rows are its filters.

    So all directions of a matrix are learned equally fast. After each step every filter is rescaled to a norm of 1
    (Karras et al. 2024, arXiv 2312.02696): the learning rate is the relative size of an update, no filter grows or
    dies, and no weight decay is needed.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.9, compile: bool = False):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.update = torch.compile(muon_update, dynamic=False) if compile else muon_update

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            self.update(weights, [weight.grad for weight in weights], buffers, group["lr"], group["momentum"])


def muon_update(
    weights: list[torch.Tensor], grads: list[torch.Tensor], buffers: list[torch.Tensor],
    lr: float | torch.Tensor, momentum: float,
) -> None:
    """One step of Muon, in place; `buffers` are running means of the gradients."""
    by_shape = {}  # matrices of one shape are orthogonalised together, for speed
    for weight, grad, buffer in zip(weights, grads, buffers, strict=True):
        buffer.lerp_(grad, 1 - momentum)
        by_shape.setdefault(weight.flatten(1).shape, []).append((weight, grad, buffer))
    for (rows, columns), tensors in by_shape.items():
        matrices, gradients, averages = (
            torch.stack([tensor.flatten(1) for tensor in kind]) for kind in zip(*tensors, strict=True))
        updates = orthogonalize(gradients.lerp(averages, momentum))  # Nesterov momentum
        matrices = F.normalize(matrices - lr * max(1, rows / columns) ** 0.5 * updates, dim=2)
        for (weight, _, _), matrix in zip(tensors, matrices, strict=True):
            weight.copy_(matrix.view_as(weight))


def muon_weights(network: nn.Module) -> list[nn.Parameter]:
    """The weights of the convolutions, but not that of the layer defined last: it sets the scale of the logits. A
    weight (1, C, 1, 1) is the scale of a norm."""
    weights = [p for name, p in network.named_parameters() if name.endswith("weight") and p.ndim > 1]
    return [p for p in weights[:-1] if p.ndim == 4 and len(p) > 1 and p.is_floating_point()]


def build_optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD, AdamW, or Muon for the weights of the convolutions with SGD for all other parameters."""
    on_cuda = next(network.parameters()).is_cuda  # these options let the learning rate be a tensor, for a CUDA graph
    sgd = {"momentum": 0.9, "nesterov": True, "fused": on_cuda}
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, **sgd)]
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(
            network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=on_cuda, capturable=on_cuda)]
    weights = muon_weights(network)
    others = [p for p in network.parameters() if p not in set(weights)]
    return [Muon(weights, recipe.lr, compile=recipe.compile), torch.optim.SGD(others, 0.1, **sgd)]


def lr_factor(progress: float, warmup_fraction: float) -> float:
    """The share of the peak learning rate after a share `progress` of the steps: linear warm-up, then half a
    cosine to zero (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    if progress < warmup_fraction:
        return progress / warmup_fraction
    return (1 + math.cos(math.pi * (progress - warmup_fraction) / (1 - warmup_fraction))) / 2


def image_size(progress: float, low_resolution_share: float) -> int:
    """The size of the images after a share `progress` of the steps: 16 pixels for the first half of the low-resolution
    share of the steps, 24 for its second half, then 32 (progressive resizing, fast.ai 2018)."""
    if progress >= low_resolution_share:
        return 32
    return 16 if progress < low_resolution_share / 2 else 24


# --- training -------------------------------------------------------------------------------------

def set_seed(seed: int) -> None:
    """Seed all generators that a network may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class CUDAGraphs:
    """A function of tensors on a GPU, whose kernels are recorded for each shape of the inputs, then launched together.

    Launches are what bounds so small a network (pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). The first
    calls with a shape are plain ones, in which optimizers create their state. A result is overwritten by the next one
    of its shape. Raises UserError for a function that cannot be recorded: one that reads a tensor's value, for example.
    """

    def __init__(self, function: Callable):
        self.function, self.calls, self.graphs = function, collections.Counter(), {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= 3:
            return self.function(*inputs)
        if shapes not in self.graphs:
            copies, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    result = self.function(*copies)
            except RuntimeError as error:
                if eval.is_out_of_memory(error):
                    raise
                raise UserError(f"the network cannot be recorded ({one_line(error)}): use --no-cuda-graphs") from error
            self.graphs[shapes] = graph, copies, result
        graph, copies, result = self.graphs[shapes]
        for copied, tensor in zip(copies, inputs, strict=True):
            copied.copy_(tensor)
        graph.replay()
        return result


def make_step(
    network: nn.Module, teachers: list[nn.Module], optimizers: list[torch.optim.Optimizer], recipe: Recipe,
    schedule: list[tuple[int, float]],
) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function that takes a step, given its number and a batch, and returns the summed cross-entropy of the batch,
    without label smoothing. `schedule` has the image size and the share of the peak learning rate of each step.

    If there are teachers, their probabilities replace the labels (Hinton et al. 2015, arXiv 1503.02531): the mean of
    `recipe.teachers_per_batch` of them, which take turns. All at once would be the least noisy target, at more cost.
    """
    device = next(network.parameters()).device
    # a CUDA graph must not use a cast that was cached before
    autocast = torch.autocast(device.type, torch.bfloat16, recipe.amp_bf16, cache_enabled=False)
    sizes, factors = zip(*schedule, strict=True)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    compiled = torch.compile(network, dynamic=False) if recipe.compile else network

    def update(images: torch.Tensor, targets: torch.Tensor, factor: float) -> torch.Tensor:
        for group in groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        forward = compiled if len(images) == recipe.batch_size else network  # compiled for whole batches only
        with autocast:
            logits = forward(images).float()
        network.zero_grad()
        F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing).backward()
        for optimizer in optimizers:
            optimizer.step()
        return F.cross_entropy(logits.detach(), targets, reduction="sum")

    if device.type == "cuda":
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # of AdamW's plain steps
        factors = torch.tensor(factors, device=device)  # a number would be part of a graph or of compiled code
        if recipe.cuda_graphs:
            update, teachers = CUDAGraphs(update), [CUDAGraphs(teacher) for teacher in teachers]

    def step(number: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels
        if teachers:
            first = number * recipe.teachers_per_batch
            turn = [teachers[i % len(teachers)] for i in range(first, first + recipe.teachers_per_batch)]
            with autocast, torch.no_grad():
                targets = torch.stack([teacher(images).float().softmax(dim=1) for teacher in turn]).mean(dim=0)
        return update(resize(images, sizes[number]), targets, factors[number])

    return step


def train_one_epoch(
    network: nn.Module, step: Callable, loader: TrainLoader, steps: range,
    after_step: Callable[[int], None] = lambda number: None,
) -> float:
    """One pass through `loader`, or a part of it: `steps` are its step numbers. Returns the mean cross-entropy."""
    loss_sum = samples = 0  # the sum becomes a tensor, which is read once
    network.train()
    for number, (images, labels) in zip(steps, loader, strict=False):  # the last epoch may be partial
        loss_sum += step(number, images, labels)
        samples += len(labels)
        after_step(number)
    return loss_sum.item() / samples


def rehearse(network: nn.Module, teachers: list[nn.Module], loader: TrainLoader, sizes: list[int]) -> list[float]:
    """Try steps on a copy of the network. Returns the seconds of each step of a run, by its image size: the least of
    three, on CUDA neither recorded nor compiled. Raises UserError if a step fails."""
    network, recipe = copy.deepcopy(network).train(), dataclasses.replace(loader.recipe, compile=False)
    n = recipe.batch_size
    images, labels = data.normalize(loader.images[:n]), loader.labels[:n]

    def run_step(size: int, samples: int) -> None:
        step = make_step(network, teachers, optimizers, recipe, [(size, 1.0)])
        step(0, images[:samples], labels[:samples]).item()  # waits for a GPU

    try:
        optimizers = build_optimizers(network, recipe)
        seconds = {size: min(timeit.repeat(functools.partial(run_step, size, n), number=1, repeat=3))
                   for size in set(sizes)}
        if rest := len(loader.images) % n:  # an epoch's last batch may be one image
            for size in seconds:
                run_step(size, rest)
    except Exception as error:  # whatever the network's code raises in bfloat16, or in training mode
        if isinstance(error, UserError) or eval.is_out_of_memory(error):
            raise
        raise UserError(f"network {recipe.network} cannot be trained ({one_line(error)}): correct it in model.py, or "
                        "try --no-amp-bf16 or another --batch-size") from error
    return [seconds[size] for size in sizes]


class Progress:
    """Shows how far a run is and how long it will take: on a terminal in place, in a log file now and then.

    Args:
        costs: the seconds of each step of the run, as rehearsed. Only their ratios count: augmentation and evaluation
            add to all steps alike.
        first: the step from which the run goes on.
        steps_per_epoch: of a whole epoch.
    """

    def __init__(self, costs: list[float], first: int, steps_per_epoch: int):
        self.costs, self.first, self.steps_per_epoch = costs, first, steps_per_epoch
        self.start = time.perf_counter()
        self.next_line = self.start + 60  # when a log file gets a line

    def left(self, step: int) -> str:
        """The time left after step number `step`, as h:mm:ss."""
        seconds = time.perf_counter() - self.start
        seconds *= sum(self.costs[step + 1 :]) / sum(self.costs[self.first : step + 1])
        return str(datetime.timedelta(seconds=round(seconds)))

    def after_step(self, step: int) -> None:
        is_terminal, now = sys.stdout.isatty(), time.perf_counter()
        if step % 10 == 9 if is_terminal else now > self.next_line:
            line = f"      step {step % self.steps_per_epoch + 1} of {self.steps_per_epoch}, {self.left(step)} left"
            say(f"\r{line:60}\r" if is_terminal else line, end="" if is_terminal else "\n")
            self.next_line = now + 600


# --- what a run leaves behind ---------------------------------------------------------------------

class Run:
    """The directory of a run: its log, graphs and checkpoint, which grow with each epoch, then weights and result.

    `settings` determine the result. `history` has a row of numbers for each epoch. `sittings` has an entry for each
    process that worked on the run, the first one and one for each --resume: its machine, epochs and seconds.
    """

    def __init__(self, directory: Path, settings: dict, machine: dict, network: nn.Module, optimizers: list):
        self.directory, self.settings, self.network, self.optimizers = directory, settings, network, optimizers
        self.history, self.sittings = [], [machine | {"epochs": 0, "seconds": 0.0}]
        # the mean of the weights after each of the last epochs
        self.averaged = AveragedModel(network) if settings["averaged_share"] else None
        self.prefix = "val" if settings["validate"] else "test"  # of the columns that measure the network
        self.start, self.can_draw, self.drawn_at = time.perf_counter(), True, -math.inf
        self.draw()  # so that a missing matplotlib is reported before the first step

    def restore(self) -> None:
        """Continue the run in the directory. Raises UserError if there is none, or if its settings differ."""
        path = self.directory / "checkpoint.pt"
        names = {"settings", "history", "sittings", "network", "averaged", "optimizer_states"}
        checkpoint = model.load_archive(
            path, names, "repeat the options of the run, name its --run-dir, or start anew without --resume")
        saved = checkpoint["settings"]
        changes = {name: f"{name} was {saved.get(name)}, is {self.settings.get(name)}"
                   for name in sorted(self.settings | saved) if saved.get(name) != self.settings.get(name)}
        for name in ("amp_bf16", *SPEED):
            if change := changes.pop(name, None):
                say(f"{change}: the run goes on, but to slightly different weights")
        if changes:
            raise UserError(f"{self.directory} holds another run ({', '.join(changes.values())}): "
                            "repeat its options, or name another --run-dir")
        model.load_state(self.network, checkpoint["network"], path, self.settings["network"])
        if self.averaged:
            self.averaged.load_state_dict(checkpoint["averaged"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})  # the rest follows from the settings
        self.history, self.sittings = checkpoint["history"], checkpoint["sittings"] + self.sittings

    def save_epoch(self, row: dict) -> None:
        history = [*self.history, row]
        self.sittings[-1] |= {"epochs": self.sittings[-1]["epochs"] + 1, "seconds": time.perf_counter() - self.start}
        model.save_archive(self.directory / "checkpoint.pt", {
            "settings": self.settings, "history": history, "sittings": self.sittings,
            "network": self.network.state_dict(), "averaged": self.averaged and self.averaged.state_dict(),
            "optimizer_states": [o.state_dict()["state"] for o in self.optimizers]})
        if not self.history:  # now there is something in the place of an older run
            for name in ("result.json", "weights.pkl"):
                (self.directory / name).unlink(missing_ok=True)
        self.history = history
        self.write_metrics()
        if time.perf_counter() - self.drawn_at > 20:  # seconds; on a GPU an epoch takes three
            self.draw()
            self.drawn_at = time.perf_counter()

    def write_metrics(self) -> None:
        lines = [self.history[0], *[row.values() for row in self.history]]
        table = "".join(",".join(map(str, line)) + "\n" for line in lines)
        data.atomic_write(self.directory / "metrics.csv", table.encode())

    def draw(self) -> None:
        """Draw accuracy.png and loss.png; before the first epoch, only try to."""
        if not self.can_draw:
            return
        try:
            for quantity in ("accuracy", "loss"):
                graph = eval.plot_history(self.history, quantity, f"CIFAR-10: {self.directory.resolve().name}")
                if self.history:
                    data.atomic_write(self.directory / f"{quantity}.png", graph)
        except Exception as error:  # no reason to lose a run
            self.can_draw = False
            say(f"the graphs cannot be drawn ({one_line(error)}): the run goes on without them")

    def finish(self, result: dict, places: list[Path]) -> float:
        """Write the weights to these places, and result.json. Returns the seconds of all sittings."""
        self.write_metrics()  # again, since the disk may have been full after the last epoch
        self.draw()
        metadata = {name: kind((self.settings | result)[name]) for name, kind in model.METADATA.items()}
        for path in places:
            model.save_weights(path, self.network, metadata)
        self.sittings[-1]["seconds"] = time.perf_counter() - self.start
        seconds = round(sum(sitting["seconds"] for sitting in self.sittings), 1)
        result = self.settings | {"parameters": model.count_parameters(self.network)} | result | {
            "seconds": seconds, "sittings": self.sittings}
        data.atomic_write(self.directory / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        return seconds

    def how_to_go_on(self) -> str:
        if not self.history:
            return "no epoch was finished: start again with the same command"
        return (f"the run is safe up to epoch {self.history[-1]['epoch']:g}: the same command, with --resume and "
                "without --overwrite, continues it")


def table_line(row: dict, prefix: str, left: str = "") -> str:
    return (f"{row['epoch']:5g}  {row['train_loss']:10.4f}  {row['train_accuracy']:8.2f}%  {row[f'{prefix}_loss']:9.4f}"
            f"  {row[f'{prefix}_accuracy']:7.2f}%  {row['lr']:8.5f}  {row['seconds']:7.1f}  {left:>9}")


# --- the run --------------------------------------------------------------------------------------

def train(run: Run, teachers: list[nn.Module], loader: TrainLoader, splits: dict[str, Split]) -> None:
    """Train to the last epoch. After each one, measure the network on `splits`; their names begin those of columns.

    After the last epoch the network gets the mean of its weights after each epoch of the averaged share, and batch norm
    its statistics with these weights (stochastic weight averaging, Izmailov et al. 2018, arXiv 1803.05407).
    """
    recipe, n = loader.recipe, len(loader)
    total_steps = max(1, round(recipe.epochs * n))
    epochs = math.ceil(total_steps / n)
    if len(run.history) == epochs:  # a finished run, to be saved again
        return
    shares = [(step + 0.5) / total_steps for step in range(total_steps)]  # of the steps; the rate is never zero
    schedule = [(image_size(share, recipe.low_resolution_share), lr_factor(share, recipe.warmup_fraction))
                for share in shares]
    step = make_step(run.network, teachers, run.optimizers, recipe, schedule)
    costs = rehearse(run.network, teachers, loader, [size for size, _ in schedule])
    progress = Progress(costs, len(run.history) * n, n)

    for epoch in range(len(run.history), epochs):
        start = time.perf_counter()
        set_seed(10_000 * loader.seed + epoch)  # for dropout
        loader.epoch = epoch
        steps = range(epoch * n, min((epoch + 1) * n, total_steps))
        loss = train_one_epoch(run.network, step, loader, steps, progress.after_step)
        if recipe.averaged_share and epoch >= epochs - max(1, round(recipe.averaged_share * recipe.epochs)):
            run.averaged.update_parameters(run.network)
            if epoch == epochs - 1:
                say("averaging the weights; the statistics of batch norm take one more pass")
                with torch.autocast(loader.images.device.type, torch.bfloat16, enabled=recipe.amp_bf16):
                    update_bn(itertools.islice(loader, len(steps)), run.averaged)
                run.network.load_state_dict(run.averaged.module.state_dict())
        row = {"epoch": min(epoch + 1, recipe.epochs)}
        for prefix, split in splits.items():
            row[f"{prefix}_accuracy"], row[f"{prefix}_loss"] = eval.evaluate(run.network, split)
        if not all(map(math.isfinite, (loss, *row.values()))):
            raise UserError(
                f"the loss is not finite in epoch {epoch + 1}: try a smaller --lr, or --optimizer adamw --lr 0.001")
        lr = run.optimizers[0].param_groups[0]["initial_lr"] * schedule[steps[-1]][1]
        run.save_epoch(row | {"batch_loss": loss, "lr": lr, "seconds": time.perf_counter() - start})
        say(table_line(run.history[-1], run.prefix, progress.left(steps[-1])))


def settings_in_effect(recipe: Recipe, network: nn.Module, n_teachers: int, device: torch.device) -> Recipe:
    """The recipe as it takes effect with this network, number of teachers and device; this is what is recorded."""
    if recipe.low_resolution_share and not all(model.takes_size(network, size) for size in (16, 24)):
        say(f"network {recipe.network} takes images of 32x32 only: no progressive resizing")
        recipe = dataclasses.replace(recipe, low_resolution_share=0.0)
    if recipe.optimizer == "muon" and not muon_weights(network):
        say(f"network {recipe.network} has no convolution that muon takes: sgd with lr {recipe.lr:g} instead")
        recipe = dataclasses.replace(recipe, optimizer="sgd")
    return dataclasses.replace(recipe, amp_bf16=recipe.amp_bf16 and eval.has_bf16(device),
                               compile=recipe.compile and device.type == "cuda",
                               cuda_graphs=recipe.cuda_graphs and device.type == "cuda",
                               label_smoothing=0.0 if n_teachers else recipe.label_smoothing,
                               teachers_per_batch=min(recipe.teachers_per_batch, max(1, n_teachers)))


@torch.no_grad()
def divide_logits(network: nn.Module, temperature: float) -> None:
    """Divide the parameters of the last layer by the temperature. Raises UserError if that does not divide the logits,
    and leaves the network in evaluation mode."""
    if temperature == 1:
        return
    *_, last = network.eval().modules()
    images = torch.randn(2, 3, 32, 32, device=next(network.parameters()).device)
    expected = network(images) / temperature
    for parameter in last.parameters():
        parameter /= temperature
    if (network(images) - expected).abs().max() > 0.01 * expected.abs().max():
        raise UserError("--calibrate needs a last layer that is linear and returns the logits: leave it out")


def print_head(run: Run, loader: TrainLoader, measured: str) -> None:
    """Print the settings, and the table up to here."""
    recipe, n, machine = loader.recipe, len(loader.images), run.sittings[-1]
    say(f"recipe {run.settings['recipe']}, seed {loader.seed}: network {recipe.network}, "
        f"{model.count_parameters(run.network):,} parameters")
    say((f"{n // 3:,} training images, augmented to {n:,}" if recipe.random_versions else f"{n:,} training images")
        + f"; measured on {measured}")
    say(f"device {machine['device']}, {machine['threads']} threads, {'bfloat16' if recipe.amp_bf16 else 'float32'}")
    say(f"log, graphs and weights go to {run.directory}\n")
    say(f"epoch  train loss  train acc  {run.prefix:>4} loss  {run.prefix:>4} acc        lr  seconds  time left")
    for row in run.history:
        say(table_line(row, run.prefix))


def run_training(args: argparse.Namespace, recipe: Recipe, run_dir: Path, places: list[Path]) -> None:
    """Set up a run, train, and print the result."""
    device = eval.pick_device(args.device)
    loaded = [model.load_weights(path) for path in args.teachers]
    for path, (_, metadata) in zip(args.teachers, loaded, strict=True):
        if args.validate and not metadata["validate"]:
            raise UserError(f"{path} has seen the held-out images: --validate needs teachers trained with --validate")
    torch.backends.cudnn.deterministic = True  # so that a resumed run equals an uninterrupted one on CUDA too
    set_seed(args.seed)
    network = model.build_network(recipe.network)
    recipe = settings_in_effect(recipe, network, len(loaded), device)
    model.perturb(trained := copy.deepcopy(network))
    if args.calibrate != 1:
        divide_logits(trained, 0.01)  # to fail now rather than after training, which makes logits larger
    training, test = (split.to(device) for split in data.load_training_data(args.data_dir, args.validate))
    loader = TrainLoader(training, recipe, args.seed)
    sample = Split(training.images[:eval.TRAIN_SAMPLE], training.labels[:eval.TRAIN_SAMPLE])
    measured = f"{len(test.images):,} {'held-out' if args.validate else 'test'} images"
    settings = {
        "recipe": args.recipe, **dataclasses.asdict(recipe), "seed": args.seed, "validate": args.validate,
        "teachers": [f"{model.describe_training(metadata)}, {metadata['accuracy']:.2f} %, "
                     f"MD5 {hashlib.md5(path.read_bytes()).hexdigest()[:8]}"  # a file may be written again
                     for path, (_, metadata) in zip(args.teachers, loaded, strict=True)]}
    optimizers = build_optimizers(network.to(device), recipe)
    run = Run(run_dir, settings, eval.describe_machine(device) | {"bfloat16": recipe.amp_bf16}, network, optimizers)
    if args.resume:
        run.restore()
    try:
        print_head(run, loader, measured)
        train(run, [model.export(teacher).to(device) for teacher, _ in loaded], loader,
              {"train": sample, run.prefix: test})
        divide_logits(network, args.calibrate)
        log_probabilities = eval.infer(network, test.images)
        if args.validate:
            temperature = args.calibrate * eval.fit_temperature(log_probabilities, test.labels)
            say(f"\nthe held-out loss is lowest with --calibrate {temperature:.2f}")
        accuracy, loss = eval.accuracy_and_loss(log_probabilities, test.labels)
        seconds = run.finish({"calibrate": args.calibrate, "accuracy": accuracy, "loss": loss}, places)
    except OSError as error:  # the disk is full, for example
        raise UserError(f"{error}: {run.how_to_go_on()}") from error
    except (MemoryError, RuntimeError) as error:
        if not run.history or not eval.is_out_of_memory(error):
            raise
        raise UserError(f"there is not enough memory: close other programs; {run.how_to_go_on()}") from error
    except KeyboardInterrupt:
        print(f"\nstopped: {run.how_to_go_on()}", file=sys.stderr)
        raise
    say(f"\n{accuracy:.2f} % of the {measured} after {seconds / 60:.1f} minutes; "
        f"the weights are in {' and '.join(map(str, places))}")


# --- the command ----------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = parser.add_argument, data.path_option
    add("--recipe", choices=RECIPES, default="fast", help="the settings to start from (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: %(default)s)")
    add("--teachers", type=path, nargs="+", action="extend", default=[], metavar="FILE",
        help="weights.pkl of networks to distil")
    add("--validate", action="store_true", help="hold out the last 5,000 training images and measure on them")
    add("--calibrate", type=float, default=1.0, metavar="T",
        help="divide the final logits by T; --validate prints the T with the least loss (default: 1)")
    add("--out", type=path, metavar="FILE", help="write the weights here too (default: weights.pkl, unless --validate)")
    add("--run-dir", type=path, metavar="DIR", help="for the run's files (default: in runs/, named after the settings)")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--resume", action="store_true", help="continue the run in its directory after its last finished epoch")
    one_of("--overwrite", action="store_true", help="start the run anew; the old one stays until an epoch is finished")
    add("--data-dir", type=path, default=data.DEFAULT_DATA_DIR, metavar="DIR", help="default: $CIFAR10_DIR, or data")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: fastest)")
    settings = parser.add_argument_group("settings of a recipe, and their values in each")
    for field in dataclasses.fields(Recipe):
        values = ", ".join(f"{name}: {getattr(recipe, field.name)}" for name, recipe in RECIPES.items())
        how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": "X"}
        settings.add_argument(f"--{field.name.replace('_', '-')}", **how, help=f"{field.metadata['help']} ({values})")
    return parser


def name_run(args: argparse.Namespace, recipe: Recipe, changes: dict) -> str:
    """A name for the directory of a run, from the options that make it another run: at most 200 characters."""
    name = "-".join([
        args.recipe, f"{recipe.epochs:g}ep", f"seed{args.seed}",
        *[f"{name}={value}" for name, value in changes.items() if name not in ("epochs", *SPEED)],
        *[f"{path.parent.name}_{path.stem}".lstrip("_") for path in args.teachers],
        *(["validate"] if args.validate else [])])
    return name if len(name) <= 200 else f"{name[:190]}-{hashlib.md5(name.encode()).hexdigest()[:8]}"


def run_command(args: argparse.Namespace) -> int:
    """Choose the settings and the directory, then train."""
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if getattr(args, f.name) is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **changes)
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed is {args.seed}: it must be from 0 to 2**31 - 1")
    if not 0.01 <= args.calibrate <= 100:
        raise UserError(f"--calibrate is {args.calibrate}: it must be from 0.01 to 100")
    args.teachers = [Path(name) for path in args.teachers  # not every shell expands patterns
                     for name in sorted(glob.glob(str(path))) or [path]]
    run_dir = args.run_dir or Path("runs") / name_run(args, recipe, changes)
    out = args.out or (run_dir if args.validate else Path()) / "weights.pkl"
    places = list(dict.fromkeys((run_dir / "weights.pkl", out)))  # one place, if they are the same
    kept = [*args.teachers, *[run_dir / name for name in ("checkpoint.pt", "metrics.csv", "result.json")]]
    for path in places:
        if path.resolve() in [other.resolve() for other in kept]:
            raise UserError(f"{path} is a teacher or another file of the run: name another --out or --run-dir")
        if run_dir.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path} is the folder of the run or one above it: name a file in --out")
    is_new = not run_dir.exists()
    for path in reversed(places):  # the run's directory last, since it is created
        data.check_writable(path)
    busy = f"another process trains in {run_dir}: wait for it, or name another --run-dir"
    with data.hold_lock(run_dir / "lock", busy):
        names = {path.name for path in run_dir.glob("[!.]*")
                 if path.suffix != ".part" and path.resolve() not in out.resolve().parents} - {"lock"}
        if names and not args.resume and not args.overwrite:
            what = ("a finished run, which --resume saves again, for another --out or --calibrate"
                    if "result.json" in names else
                    "an unfinished run, which --resume continues" if "checkpoint.pt" in names else "other files")
            raise UserError(f"{run_dir} holds {what}: name another --run-dir, or start over with --overwrite")
        try:
            run_training(args, recipe, run_dir, places)
        finally:
            if is_new and [path.name for path in run_dir.rglob("*") if path.is_file()] == ["lock"]:
                shutil.rmtree(run_dir, ignore_errors=True)  # nothing came of it
    return 0


def main(argv: list[str] | None = None) -> int:
    return eval.run_script(run_command, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
