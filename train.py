"""Train a CIFAR-10 classifier of at most 50,000 parameters and save its weights.

    python train.py                               recipe "fast": minutes on two CPU cores -> weights.pkl
    python train.py --out runs/mine.pkl           the same, and weights.pkl stays as it is
    python train.py --epochs 1                    less time, or more: the learning rate schedule stretches
    python train.py --recipe quick                about 80 % in two minutes
    python train.py --recipe report               the report's network and settings
    python train.py --recipe best                 a night, for accuracy
    python train.py --recipe best --teachers A B  distillation from the networks saved in A and B
    python train.py --validate                    hold out 5,000 training images and measure on them
    python train.py --resume                      continue an interrupted run

A run leaves metrics.csv, accuracy.png, loss.png, result.json and checkpoint.pt in its directory.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # a dependency of torch
from torch import nn

import model
from data import DEFAULT_DATA_DIR, DataError, Split, TrainLoader, load_training_data, progressive_resize
from eval import evaluate, infer


class TrainingError(Exception):
    """A run that cannot start or continue; the message says what to do."""


# --- recipes --------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a run, except its seed and its teachers. Raises TrainingError for a bad value."""

    network: str                        # a key of model.NETWORKS
    # optimisation
    epochs: float                       # passes through the training set, augmented or not; the last may be partial
    batch_size: int
    optimizer: str                      # one of OPTIMIZERS
    lr: float                           # peak learning rate; with muon, of the convolutions' weights (of the rest: 0.1)
    weight_decay: float                 # 0 with muon, since filters have norm 1
    warmup_fraction: float              # share of the steps in which the learning rate rises
    # regularisation
    dropout: float = 0.0                # of the features before the linear layer
    label_smoothing: float = 0.0        # Szegedy et al. 2016, arXiv 1512.00567; unused with teachers
    temperature: float = 1.0            # calibration: divides the final logits; --validate prints the best value
    # augmentation: see data.TrainLoader
    random_forms: bool = True
    resample: bool = False
    autoaugment_group_size: int = 1
    autoaugment_flipped: bool = False
    crop_padding: int = 0
    # speed
    low_resolution_share: float = 0.0   # share of the steps on small images
    amp_bf16: bool = False              # bfloat16 autocast, where the hardware computes in bfloat16

    def __post_init__(self):
        rules = [
            ("network", self.network in model.NETWORKS, f"one of {', '.join(model.NETWORKS)}"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("weight_decay", self.weight_decay == 0 or self.optimizer != "muon", "0 with muon"),
            ("crop_padding", 0 <= self.crop_padding <= 32, "from 0 to 32"),
        ]
        for name in ("epochs", "batch_size", "lr", "temperature", "autoaugment_group_size"):
            rules.append((name, 0 < getattr(self, name) < math.inf, "above 0"))
        for name in ("warmup_fraction", "dropout", "label_smoothing", "low_resolution_share"):
            rules.append((name, 0 <= getattr(self, name) < 1, "at least 0 and below 1"))
        for name, is_met, rule in rules:
            if not is_met:
                raise TrainingError(f"{name} is {getattr(self, name)!r}: it must be {rule}")


OPTIMIZERS = ("sgd", "adamw", "muon")

RECIPES = {
    # epochs, batch size, learning rate and dropout are the report's; it names no optimizer and no schedule
    "report": Recipe(
        network="report", epochs=20, batch_size=250, optimizer="adamw", lr=0.03, weight_decay=0.0,
        warmup_fraction=0.1, dropout=0.2, amp_bf16=True),
    # high accuracy in minutes; docs/notes.md tells how the values were chosen
    "fast": Recipe(
        network="gated", epochs=2, batch_size=128, optimizer="muon", lr=0.03, weight_decay=0.0,
        warmup_fraction=0.15, label_smoothing=0.1, resample=True, autoaugment_group_size=16, crop_padding=2,
        low_resolution_share=0.3, amp_bf16=True),
}
RECIPES["quick"] = dataclasses.replace(  # about 80 % in two minutes; so short a run memorises little
    RECIPES["fast"], epochs=1, batch_size=64, lr=0.05, warmup_fraction=0.3, random_forms=False, crop_padding=0)
RECIPES["best"] = dataclasses.replace(  # for long runs, with or without teachers
    RECIPES["fast"], network="gated32", epochs=40, autoaugment_flipped=True, crop_padding=4)


# --- optimisation ---------------------------------------------------------------------------------

class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for filters of norm 1.

    Muon orthogonalises the update of a weight matrix, so that all its directions are learned at one rate. After each
    step every row, which is a filter, is rescaled to a norm of 1 (Karras et al. 2024, arXiv 2312.02696). So the
    learning rate is the relative size of an update, no filter grows or dies, and no weight decay is needed. All
    matrices of the same shape are orthogonalised together, for speed.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, (a, b, c) = group["momentum"], group["ns_coefficients"]
            by_shape = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - momentum)
                    updates.append(parameter.grad.lerp(buffer, momentum))
                x = torch.stack(updates).bfloat16()
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):  # Newton-Schulz iteration
                    gram = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                x = x.mT if rows > columns else x
                for parameter, update in zip(parameters, x, strict=True):
                    parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
                    parameter.copy_(F.normalize(parameter))


def build_optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD, AdamW, or Muon for the flip-equivariant convolutions with SGD for all other parameters."""
    sgd = {"momentum": 0.9, "nesterov": True}
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, **sgd)]
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)]
    matrices = [module.weight for module in network.modules() if isinstance(module, model.FlipConv2d)]
    others = [p for p in network.parameters() if all(p is not matrix for matrix in matrices)]
    if not matrices:
        raise TrainingError(f"optimizer is 'muon': it needs a flip-equivariant network, not {recipe.network!r}")
    return [  # three iterations of the orthogonalisation, not five: an approximation is enough
        BatchedMuon(matrices, recipe.lr, weight_decay=0.0, momentum=0.9, ns_steps=3),
        torch.optim.SGD(others, 0.1, **sgd)]


def lr_factor(progress: float, warmup_fraction: float) -> float:
    """The share of the peak learning rate after a share `progress` of the steps: linear warm-up, then half a
    cosine to zero (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    if progress < warmup_fraction:
        return progress / warmup_fraction
    return (1 + math.cos(math.pi * (progress - warmup_fraction) / (1 - warmup_fraction))) / 2


def train_one_epoch(
    network: nn.Module, teachers: list[nn.Module], loader: TrainLoader, optimizers: list[torch.optim.Optimizer],
    recipe: Recipe, steps: range, total_steps: int,
) -> float:
    """One pass through `loader`, or a part of it: `steps` are its step numbers, out of the run's `total_steps`.

    The probabilities of `teachers`, if there are any, replace the labels (Hinton et al. 2015, arXiv 1503.02531). The
    teachers take turns, one a batch: cheaper than their mean, which is the expected target. Returns the mean
    cross-entropy with the targets of the training, without label smoothing.
    """
    device = next(network.parameters()).device
    loss_sum = torch.zeros((), device=device)  # summed on the device: reading a number stalls a GPU
    samples = 0
    network.train()
    for step, (images, labels) in zip(steps, loader, strict=False):  # the last epoch may be partial
        progress = (step + 0.5) / total_steps  # half a step in: the learning rate is never zero
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor(progress, recipe.warmup_fraction)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp_bf16):
            with torch.no_grad():
                targets = teachers[step % len(teachers)](images).float().exp() if teachers else labels
            log_probabilities = network(progressive_resize(images, progress, recipe.low_resolution_share))
            loss = F.cross_entropy(log_probabilities, targets, label_smoothing=recipe.label_smoothing)
            loss_sum += F.cross_entropy(log_probabilities.detach(), targets, reduction="sum")
        network.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        samples += len(labels)
        if sys.stdout.isatty() and step % 10 == 0:
            print(f"\r      step {step - steps[0]} of {len(steps)}\r", end="", flush=True)
    return loss_sum.item() / samples


def fit_temperature(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, from 0.5 to 2, with the least loss (temperature scaling: Guo et al. 2017, arXiv 1706.04599)."""
    temperatures = [hundredths / 100 for hundredths in range(50, 201)]
    return min(temperatures, key=lambda t: F.cross_entropy(log_probabilities / t, labels).item())


# --- what a run prints and leaves behind ----------------------------------------------------------

def table_line(row: dict, epochs: float) -> str:
    epoch, train_loss, train_accuracy, loss, accuracy, _, lr, seconds = row.values()
    left = round(seconds * (epochs - epoch))
    return (f"{epoch:5g}  {train_loss:10.4f}  {train_accuracy:8.2f}%  {loss:9.4f}  {accuracy:7.2f}%  {lr:8.5f}"
            f"  {seconds:7.1f}  {left // 3600:3}:{left // 60 % 60:02}:{left % 60:02}")


def plot_history(run_dir: Path) -> None:
    """Draw accuracy.png and loss.png in `run_dir` from its metrics.csv."""
    from matplotlib.figure import Figure  # slow to import, and needed only here

    path = run_dir / "metrics.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        prefix, label = ("val", "held-out images") if "val_loss" in rows[0] else ("test", "test set")
        names = ("epoch", "train_accuracy", f"{prefix}_accuracy", "train_loss", f"{prefix}_loss")
        columns = {name: [float(row[name]) for row in rows] for name in names}
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} is not the log of a run ({error}): name another --run-dir") from error
    for name, ylabel in (("accuracy", "accuracy (%)"), ("loss", "loss (negative log-likelihood)")):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(columns["epoch"], columns[f"train_{name}"], ".-", label=f"{TRAIN_SAMPLE:,} training images")
        axes.plot(columns["epoch"], columns[f"{prefix}_{name}"], ".-", label=label)
        axes.set(xlabel="epoch (values at its end)", ylabel=ylabel, title=f"CIFAR-10: {run_dir.resolve().name}")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(run_dir / f"{name}.png", dpi=120)


# --- the run --------------------------------------------------------------------------------------

TRAIN_SAMPLE = 5_000  # training images, not augmented, that the network is measured on after each epoch
CHECKPOINT = {"settings", "history", "seconds", "network", "optimizers"}


def resume_or_start(
    args: argparse.Namespace, run_dir: Path, settings: dict, network: nn.Module, optimizers: list,
) -> tuple[list[dict], float]:
    """Restore the run to resume, or clear the directory for a new one. Returns the history and the seconds so far.

    Raises TrainingError if the checkpoint has other settings, or if a new run would replace an unfinished one.
    """
    path = run_dir / "checkpoint.pt"
    if args.resume:
        checkpoint = model.load_archive(path, CHECKPOINT, "start without --resume")
        saved = checkpoint["settings"]
        changes = [f"{name} was {saved.get(name)}, is {settings.get(name)}"
                   for name in sorted((settings | saved).keys() - {"temperature"})  # which acts after the last epoch
                   if saved.get(name) != settings.get(name)]
        if changes:
            raise TrainingError(
                f"{run_dir} holds another run ({', '.join(changes)}): give its options, or another --run-dir")
        network.load_state_dict(checkpoint["network"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint["history"], checkpoint["seconds"]
    if path.exists() and not (run_dir / "result.json").exists() and not args.overwrite:
        saved = model.load_archive(path, CHECKPOINT, "replace it with --overwrite")
        raise TrainingError(
            f"{run_dir} holds an unfinished run, {saved['history'][-1]['epoch']:g} of {saved['settings']['epochs']:g} "
            "epochs done: continue it with --resume, or replace it with --overwrite")
    for name in ("checkpoint.pt", "metrics.csv", "result.json", "accuracy.png", "loss.png"):
        (run_dir / name).unlink(missing_ok=True)
    return [], 0.0


def train(args: argparse.Namespace, recipe: Recipe, run_dir: Path, out: Path) -> None:
    """Train to the last epoch, and write the weights, the log and the graphs."""
    start = time.perf_counter()
    device = model.pick_device(args.device)
    loaded = [model.load_weights(path) for path in args.teachers]
    for path, (_, metadata) in zip(args.teachers, loaded, strict=True):
        if args.validate and not metadata["validate"]:
            raise TrainingError(f"{path} has seen the held-out images: with --validate, use teachers trained with it")
    recipe = dataclasses.replace(  # the settings that take effect
        recipe, amp_bf16=recipe.amp_bf16 and model.has_bf16(device),
        label_smoothing=0.0 if loaded else recipe.label_smoothing)
    settings = {"recipe": args.recipe, **dataclasses.asdict(recipe), "seed": args.seed, "validate": args.validate,
                "teachers": [model.describe_training(metadata) for _, metadata in loaded]}
    teachers = [model.export(network).to(device, memory_format=torch.channels_last) for network, _ in loaded]
    training, test = (split.to(device) for split in load_training_data(args.data_dir, args.validate))
    train_sample = Split(training.images[:TRAIN_SAMPLE], training.labels[:TRAIN_SAMPLE])
    loader = TrainLoader(
        training, batch_size=recipe.batch_size, seed=args.seed, random_forms=recipe.random_forms,
        resample=recipe.resample, autoaugment_group_size=recipe.autoaugment_group_size,
        autoaugment_flipped=recipe.autoaugment_flipped, crop_padding=recipe.crop_padding)
    torch.backends.cudnn.deterministic = True  # so that a resumed run equals an uninterrupted one on CUDA too
    torch.manual_seed(args.seed)
    network = model.build_network(recipe.network, dropout=recipe.dropout).to(device)
    optimizers = build_optimizers(network, recipe)
    history, seconds = resume_or_start(args, run_dir, settings, network, optimizers)
    start -= seconds  # those before the interruption count too

    prefix, measured = ("val", "held-out images") if args.validate else ("test", "test images")
    parameters = model.count_parameters(network)
    print(f"recipe {args.recipe}, seed {args.seed}: network {recipe.network}, {parameters:,} parameters")
    augmented = f", augmented to {len(loader.images):,}" if recipe.random_forms else ""
    print(f"{len(training.images):,} training images{augmented}; {len(test.images):,} {measured}")
    print(f"device {device}, {torch.get_num_threads()} threads, {'bfloat16' if recipe.amp_bf16 else 'float32'}")
    print(f"log and graphs go to {run_dir}, weights to {out}{' (replaced at the end)' if out.exists() else ''}\n")
    print(f"epoch  train loss  train acc  {prefix:>4} loss  {prefix:>4} acc        lr  seconds  time left")
    for row in history:
        print(table_line(row, recipe.epochs))
    total_steps = max(1, round(recipe.epochs * len(loader)))
    for epoch in range(len(history), math.ceil(total_steps / len(loader))):
        epoch_start = time.perf_counter()
        torch.manual_seed(10_000 * args.seed + epoch)  # for dropout
        loader.set_epoch(epoch)
        steps = range(epoch * len(loader), min((epoch + 1) * len(loader), total_steps))
        batch_loss = train_one_epoch(network, teachers, loader, optimizers, recipe, steps, total_steps)
        if not math.isfinite(batch_loss):
            raise TrainingError(f"the loss is {batch_loss} in epoch {epoch + 1}: try a smaller --lr")
        train_accuracy, train_loss = evaluate(network, train_sample)
        accuracy, loss = evaluate(network, test)
        history.append({
            "epoch": min(epoch + 1, recipe.epochs), "train_loss": train_loss, "train_accuracy": train_accuracy,
            f"{prefix}_loss": loss, f"{prefix}_accuracy": accuracy, "batch_loss": batch_loss,
            "lr": optimizers[0].param_groups[0]["lr"], "seconds": time.perf_counter() - epoch_start})
        lines = [history[0].keys(), *[row.values() for row in history]]
        model.atomic_write(run_dir / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        model.save_archive(run_dir / "checkpoint.pt", {
            "settings": settings, "history": history, "seconds": time.perf_counter() - start,
            "network": network.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        print(table_line(history[-1], recipe.epochs), flush=True)

    accuracy, loss = history[-1][f"{prefix}_accuracy"], history[-1][f"{prefix}_loss"]
    if args.validate:
        print(f"\nthe loss is least with --set temperature={fit_temperature(infer(network, test.images), test.labels)}")
    if recipe.temperature != 1:
        for parameter in list(network.parameters())[-2:]:  # weight and bias of the linear layer that gives the logits
            parameter.data /= recipe.temperature
        accuracy, loss = evaluate(network, test)
    model.save_weights(out, network, {
        "network": recipe.network, "recipe": args.recipe, "seed": args.seed, "epochs": float(recipe.epochs),
        "validate": args.validate, "accuracy": accuracy})
    seconds = time.perf_counter() - start
    result = settings | {
        "parameters": parameters, "accuracy": accuracy, "loss": loss, "seconds": round(seconds, 1),
        "device": str(device), "threads": torch.get_num_threads(), "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "numpy")}}
    model.atomic_write(run_dir / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    plot_history(run_dir)
    print(f"\n{accuracy:.2f} % of the {len(test.images):,} {measured} after {recipe.epochs:g} epochs and "
          f"{seconds / 60:.1f} minutes; the weights are in {out}")


# --- the command ----------------------------------------------------------------------------------

def recipe_value(text: str) -> tuple[str, object]:
    """`NAME=VALUE` -> the name of a field of Recipe, and the value in its type, for argparse."""
    name, _, value = text.partition("=")
    types = {field.name: field.type for field in dataclasses.fields(Recipe)}
    if name not in types:
        raise argparse.ArgumentTypeError(f"a recipe has no field {name!r}, only {', '.join(types)}")
    try:
        return name, {"True": True, "False": False}[value] if types[name] is bool else types[name](value)
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{name} takes {types[name].__name__} values, not {value!r}") from error


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="fast", help="the settings to start from (default: %(default)s)")
    add("--epochs", type=float, metavar="N", help="passes through the training set, whole or partial")
    add("--batch-size", type=int, metavar="N", help="samples per step")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--set", type=recipe_value, action="append", default=[], metavar="NAME=VALUE", help="any field of the recipe")
    add("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)")
    add("--teachers", type=Path, nargs="+", default=[], metavar="FILE", help="weights of networks to distil")
    add("--validate", action="store_true", help="hold out the last 5,000 training images and measure on them")
    add("--out", type=Path, metavar="FILE", help="the weights (default: weights.pkl; with --validate, in --run-dir)")
    add("--run-dir", type=Path, metavar="DIR", help="log and checkpoint (default: in runs/, named after the settings)")
    add("--resume", action="store_true", help="continue the run in its directory after its last finished epoch")
    add("--overwrite", action="store_true", help="replace an unfinished run in the directory")
    add("--plots-only", action="store_true", help="only draw the graphs, from the run's metrics.csv")
    add("--data-dir", default=DEFAULT_DATA_DIR, metavar="DIR", help="the data set (default: $CIFAR10_DIR, or data)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: fastest)")
    return parser


def run(args: argparse.Namespace) -> None:
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    changes = {name: value for name, value in given.items() if value is not None} | dict(args.set)
    recipe = dataclasses.replace(RECIPES[args.recipe], **changes)
    if not 0 <= args.seed < 2**31:
        raise TrainingError(f"--seed is {args.seed}: it must be from 0 to 2**31 - 1")
    words = [args.recipe, f"{recipe.epochs:g}ep", f"seed{args.seed}",
             *[f"{name}={value}" for name, value in changes.items() if name != "epochs"],
             *["_".join(path.with_suffix("").parts[-2:]) for path in args.teachers], *["validate"] * args.validate]
    run_dir = args.run_dir or Path("runs") / "-".join(words)  # named after the settings
    if args.plots_only:
        plot_history(run_dir)
        print(f"drawn: {run_dir / 'accuracy.png'}, {run_dir / 'loss.png'}")
        return
    out = args.out or (run_dir / "weights.pkl" if args.validate else Path("weights.pkl"))
    for folder in (run_dir, out.parent):  # better now than after the training
        folder.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise TrainingError(f"{out} cannot be written: name another file with --out")
    try:
        with FileLock(run_dir / "lock", timeout=0):
            train(args, recipe, run_dir, out)
    except Timeout as error:
        raise TrainingError(f"another process trains in {run_dir}: wait for it, or name another --run-dir") from error
    except OSError as error:  # the disk is full, for example
        path = run_dir / "checkpoint.pt"
        if not path.exists():
            raise
        epoch = model.load_archive(path, CHECKPOINT, "start with --overwrite")["history"][-1]["epoch"]
        raise TrainingError(f"{error}: the run is safe up to epoch {epoch:g}, continue with --resume") from error


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    model.reuse_freed_memory()
    try:
        run(args)
        return 0
    except (TrainingError, DataError, model.ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command with --resume continues after the last finished epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
