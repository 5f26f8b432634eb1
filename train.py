"""Train a CIFAR-10 classifier of at most 50,000 parameters and save its weights.

    python train.py                              the recipe "fast", seed 0 -> weights.pkl
    python train.py --epochs 1                   any recipe in less time, or more: the schedule stretches
    python train.py --recipe report              the report's network and recipe
    python train.py --recipe best                an hour and a half, for the accuracy
    python train.py --teachers A B               learn from the networks whose weights A and B are, not the labels
    python train.py --validate                   measure on 5,000 held-out training images instead
    python train.py --resume                     go on after an interruption
    python train.py --plots-only --run-dir DIR   draw DIR's two graphs again from its metrics.csv

A run leaves metrics.csv, accuracy.png, loss.png, result.json and checkpoint.pt in its directory.
"""

import argparse
import csv
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import DataError, Split, batches, enlarge, load_training_data, redraw, replacing, shrink
from eval import command_parser, evaluate, exit_status, pick_device, positive
from model import ModelError, build_network, count_parameters, fold_batch_norm, load_weights, read_archive, save_weights

# --- recipes ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a result besides the seed; what each value was chosen for stands in RECIPES."""

    network: str          # the name by which model.build_network knows it
    max_degrees: float    # the mirrored form of an image is turned by up to this angle
    together: int         # images that share a draw of AutoAugment
    augment_turned: bool  # the mirrored form goes through AutoAugment too
    redraw: bool          # the enlarged set is drawn anew for each pass through it
    crop: int             # pixels by which an image is shifted at most, a draw a batch and image
    small: float          # share of the steps on shrunken images: half of them 16x16, then as many 24x24
    epochs: float         # passes through the enlarged set; the last one may be a part of it
    batch_size: int       # images a step
    lr: float             # the highest learning rate
    vector_lr: float      # with muon, that of all but the convolutions' weights
    warmup: float         # share of the steps over which the rates rise to it from zero
    final_lr: float       # share of the rates that is left at the last step, reached along half a cosine
    optimizer: str        # a key of OPTIMIZERS
    momentum: float       # SGD's and Muon's momentum, Adam's beta1
    weight_decay: float   # on every parameter that lr is for
    label_smoothing: float  # share of the target that all ten classes have in common
    temperature: float    # with --teachers, that of the probabilities which are learnt from them
    dropout: float        # share of the features dropped before the linear layer
    bfloat16: bool        # the network computes in bfloat16 where the hardware does; weights stay float32
    compile: bool         # torch.compile on a CPU: equal up to rounding and which features dropout draws

    def __post_init__(self):
        fits = (
            0 < self.epochs < math.inf and self.batch_size > 0 and self.together > 0 and self.optimizer in OPTIMIZERS
            and all(0 < value < math.inf for value in (self.lr, self.vector_lr, self.temperature))
            and all(0 <= share < 1 for share in (self.warmup, self.momentum, self.dropout))
            and all(0 <= share <= 1 for share in (self.small, self.final_lr, self.label_smoothing))
            and 0 <= self.weight_decay < math.inf and 0 <= self.max_degrees <= 180 and 0 <= self.crop <= 32
        )
        if not fits:
            raise ModelError(f"no recipe can have these values, one of them is out of range: {self}")


Optimizers = list[torch.optim.Optimizer]


def sgd(parameters: Iterable[torch.Tensor], lr: float, recipe: Recipe, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=lr, momentum=recipe.momentum, weight_decay=weight_decay, nesterov=recipe.momentum > 0)


def muon(network: nn.Module, recipe: Recipe) -> Optimizers:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the convolutions' weights, SGD for the rest.

    Muon takes matrices: a network for it keeps its convolutions' weights as such. It replaces each
    gradient by the nearest matrix whose rows are orthogonal, so that all directions are learnt at one rate.
    """
    matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and not name.startswith("classifier")]
    if not matrices:
        raise ModelError("muon finds no convolution's weights kept as a matrix: choose another optimizer or network")
    taken = {id(p) for p in matrices}
    return [
        torch.optim.Muon(matrices, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
                         ns_steps=3),  # its iteration's default is five: three are enough for a direction
        sgd([p for p in network.parameters() if id(p) not in taken], recipe.vector_lr, recipe, 0.0),
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module, Recipe], Optimizers]] = {
    "sgd": lambda network, r: [sgd(network.parameters(), r.lr, r, r.weight_decay)],
    "adam": lambda network, r: [torch.optim.AdamW(
        network.parameters(), lr=r.lr, betas=(r.momentum, 0.999), weight_decay=r.weight_decay)],
    "muon": muon,
}

RECIPES = {
    "report": Recipe(
        network="report",
        epochs=20, batch_size=250, lr=0.03, dropout=0.2,  # the report's own values
        # the report has none of these
        crop=0, small=0.0, label_smoothing=0.0, temperature=1.0, bfloat16=False,
        max_degrees=15.0, together=1, augment_turned=False, redraw=False,  # the report says no angle; not tuned
        # The report names no optimiser and no schedule: decay and weight decay paid on the held-out images,
        # AdamW was ahead of SGD after two epochs and has not been tried for twenty, see the README.
        optimizer="sgd", momentum=0.9, weight_decay=5e-4, final_lr=0.0, vector_lr=0.03,
        warmup=0.1,        # usual; not tuned
        compile=True,      # 1.4 to 1.5 times the images per second on two cores: docs/benchmark.txt
    ),
    "fast": Recipe(
        # chosen on the held-out images, the table is in docs/fast; what it does not name was not tuned
        network="paired 64x3@16 64x4@8",
        epochs=2.5,        # about four minutes on two cores; more of them reach further
        batch_size=128,    # 256 is behind in a short run
        optimizer="muon", lr=0.2, vector_lr=0.1, momentum=0.9, weight_decay=0.01,
        warmup=0.15, final_lr=0.0,
        crop=2, small=0.3, label_smoothing=0.1, temperature=1.0,
        max_degrees=15.0, together=16, augment_turned=False, redraw=True,  # draws of AutoAugment cost seconds a pass
        dropout=0.0,
        bfloat16=True, compile=False,
    ),
}
RECIPES["best"] = dataclasses.replace(
    RECIPES["fast"],  # and what is for long runs, with --teachers or without; docs/best tells why
    network="gated 32x0@32 64x3@16 64x4@8",
    epochs=40, lr=0.1, crop=4, augment_turned=True, temperature=2.0,
)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works and pays there: it was measured to pay on CPUs, and needs a C++ compiler."""
    if device.type != "cpu":
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.ones(4))
        return True
    except Exception as error:  # no compiler, no Python.h, no OpenMP, a Python newer than torch knows: all mean no
        reason = str(error).strip().splitlines() or ["for no stated reason"]
        print(f"training without torch.compile, which fails here: {reason[0][:200]}", file=sys.stderr)
        return False


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16; others emulate it, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # get_capabilities is newer than the oldest PyTorch that will do
    features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def rate_share(recipe: Recipe, progress: float) -> float:
    """The share of the highest rate when a share `progress` (0..1) of the steps is done.

    Up along a line while it warms up, then down along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """
    if progress < recipe.warmup:
        return progress / recipe.warmup
    decay = (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.final_lr + (1 - recipe.final_lr) * (1 + math.cos(math.pi * decay)) / 2


def image_side(recipe: Recipe, progress: float) -> int:
    """The side in pixels of the images that are trained on when a share `progress` of the steps is done.

    An image of 16x16 has a quarter of the multiply-adds (fast.ai's progressive resizing, 2018).
    """
    if progress > recipe.small:
        return 32
    return 16 if progress <= recipe.small / 2 else 24


# --- training ---------------------------------------------------------------------------------


def smoothed_loss(log_probabilities: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean negative log-likelihood, with a share `smoothing` of the target spread over all classes.

    As F.cross_entropy's label_smoothing (Szegedy et al. 2016, arXiv 1512.00567), for log-probabilities.
    """
    loss = F.nll_loss(log_probabilities, labels)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * log_probabilities.mean()


def soft_targets(teachers: list[nn.Module], images: torch.Tensor, temperature: float) -> torch.Tensor:
    """The teachers' mean probabilities (N, 10) for `images`, raised to 1 / temperature and scaled to a sum of one."""
    with torch.no_grad():
        probabilities = torch.stack([teacher(images).exp() for teacher in teachers]).mean(dim=0)
    return F.softmax(probabilities.clamp(min=1e-6).log() / temperature, dim=1)


def distillation_loss(log_probabilities: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean cross-entropy of the softened probabilities with `targets` (Hinton et al. 2015, arXiv 1503.02531).

    Times the temperature: so the gradient at the logits is the difference of the two, as it is with labels.
    """
    return temperature * F.cross_entropy(log_probabilities / temperature, targets)


def count_steps(recipe: Recipe, n: int) -> tuple[int, int]:
    """The steps of one pass through n samples, and those of all `recipe.epochs`, at least one."""
    steps_a_pass = math.ceil(n / recipe.batch_size)
    return steps_a_pass, max(1, round(recipe.epochs * steps_a_pass))


def train_epoch(
    step_network: Callable[[torch.Tensor], torch.Tensor],
    optimizers: Optimizers,
    train: Split,
    recipe: Recipe,
    teachers: list[nn.Module],
    epoch: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """One pass through `train`, or as much of it as is left of `recipe.epochs`.

    Args:
        step_network: the network, or its compiled form.
        optimizers: of its parameters.
        train: what to go through.
        recipe: how.
        teachers: networks whose probabilities are learnt instead of the labels, if there are any.
        epoch: which pass it is, from 0.
        generator: draws order and crops.

    Returns:
        The mean negative log-likelihood and the accuracy in percent, over the pass, of the batches as they were
        trained on.
    """
    steps_a_pass, all_steps = count_steps(recipe, len(train.images))
    steps = min(steps_a_pass, all_steps - epoch * steps_a_pass)
    device = train.images.device
    # summed on the device: reading a number at every step would make a GPU wait for it
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.long)
    seen = 0
    for step, (images, labels) in zip(range(steps), batches(train, recipe.batch_size, generator, recipe.crop)):
        progress = (epoch * steps_a_pass + step + 1) / all_steps
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = group.setdefault("highest_lr", group["lr"]) * rate_share(recipe, progress)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            targets = soft_targets(teachers, images, recipe.temperature) if teachers else None
            log_probabilities = step_network(shrink(images, image_side(recipe, progress)))
        if teachers:
            loss = distillation_loss(log_probabilities, targets, recipe.temperature)
        else:
            loss = smoothed_loss(log_probabilities, labels, recipe.label_smoothing)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        loss_sum += F.nll_loss(log_probabilities.detach(), labels, reduction="sum")  # as it is tested: not smoothed
        correct += (log_probabilities.detach().argmax(dim=1) == labels).sum()
        seen += len(labels)
        show_progress(step + 1, steps)
    return loss_sum.item() / seen, 100 * correct.item() / seen


def fit(
    network: nn.Module,
    train: Split,
    test: Split,
    recipe: Recipe,
    teachers: list[nn.Module],
    seed: int,
    checkpoint: dict,
) -> Iterator[tuple[dict, dict]]:
    """Train `network` and yield, after each epoch, its row of figures and what a checkpoint must hold.

    `checkpoint` is empty, or holds that of the epoch to go on from.

    Every random number of an epoch follows from `seed` and the epoch's number, so a run that goes
    on from a checkpoint draws what the uninterrupted run would have drawn.
    """
    optimizers = OPTIMIZERS[recipe.optimizer](network, recipe)
    teachers = [fold_batch_norm(teacher).to(memory_format=torch.channels_last) for teacher in teachers]
    epochs_done = checkpoint.get("epochs_done", 0)
    if epochs_done:
        network.load_state_dict(checkpoint["network"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    step_network = torch.compile(network, dynamic=False) if recipe.compile else network

    steps_a_pass, all_steps = count_steps(recipe, len(train.images))
    for epoch in range(epochs_done, math.ceil(all_steps / steps_a_pass)):
        start = time.perf_counter()
        torch.manual_seed(seed * 10_000 + epoch)  # for dropout, on every device
        generator = torch.Generator().manual_seed(seed * 10_000 + epoch)
        if recipe.redraw and epoch:
            redraw(train, seed * 10_000 + epoch, recipe.max_degrees, recipe.together, recipe.augment_turned)
        network.train()
        train_loss, train_accuracy = train_epoch(step_network, optimizers, train, recipe, teachers, epoch, generator)
        test_accuracy, test_loss = evaluate(network, test)
        row = {
            "epoch": min(epoch + 1, recipe.epochs),
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": optimizers[0].param_groups[0]["lr"],
            "seconds": time.perf_counter() - start,
        }
        yield row, {
            "epochs_done": epoch + 1,
            "network": network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }


# --- what a run prints and leaves behind ------------------------------------------------------

TABLE_HEAD = "epoch  train loss  train acc  {0} loss  {0} acc        lr  seconds  time left"


def table_line(row: dict, epochs: int) -> str:
    left = round(row["seconds"] * (epochs - row["epoch"]))
    return (
        f"{row['epoch']:5g}  {row['train_loss']:10.4f}  {row['train_accuracy']:8.2f}%  {row['test_loss']:9.4f}"
        f"  {row['test_accuracy']:7.2f}%  {row['lr']:8.5f}  {row['seconds']:7.1f}"
        f"  {left // 3600:3}:{left // 60 % 60:02}:{left % 60:02}"
    )


def show_progress(step: int, steps: int) -> None:
    """Overwrite one line with how far the epoch is; on a terminal only."""
    if sys.stdout.isatty() and (step % 10 == 0 or step == steps):
        end = "\r\033[K" if step == steps else ""
        print(f"\r       step {step} of {steps}{end}", end="", flush=True)


def write_csv(path: Path, rows: list[dict]) -> None:
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot_run(run_dir: Path) -> None:
    """Draw accuracy.png and loss.png from metrics.csv, all in `run_dir`."""
    import matplotlib  # slow to import, and needed only here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    path = run_dir / "metrics.csv"
    result_path = run_dir / "result.json"  # not there for a log alone: the title then says less
    try:
        with open(path, newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        names = ("epoch", "train_accuracy", "test_accuracy", "train_loss", "test_loss")
        columns = {name: [row[name] for row in rows] for name in names}
        result = json.loads(result_path.read_text()) if result_path.exists() else {}
        title = f"CIFAR-10, recipe {result['recipe']}, seed {result['seed']}" if result else "CIFAR-10"
        measured = "held-out images" if result and result["validate"] else "test set"
        if not rows:
            raise ValueError("it has no rows")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no log of a run ({error}): name a run's directory with --run-dir") from None

    for figure, label in (("accuracy", "accuracy (%)"), ("loss", "loss (negative log-likelihood)")):
        fig, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        axes.plot(columns["epoch"], columns[f"train_{figure}"], marker=".",
                  label="training set (enlarged; mean over the epoch)")
        axes.plot(columns["epoch"], columns[f"test_{figure}"], marker=".",
                  label=f"{measured} (at the end of the epoch)")
        axes.set(xlabel="epoch", ylabel=label, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(run_dir / f"{figure}.png") as part:
            fig.savefig(part, dpi=120, format="png")
        plt.close(fig)


# --- the command ------------------------------------------------------------------------------


def recipe_value(text: str) -> tuple[str, object]:
    """`NAME=VALUE` -> the name and the value in the type that Recipe gives it, for argparse."""
    name, _, value = text.partition("=")
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"a recipe has no value {name!r}, only {', '.join(kinds)}")
    try:
        return name, {"True": True, "False": False}[value] if kinds[name] is bool else kinds[name](value)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{name} takes {kinds[name].__name__} values, not {value!r}") from None


def seed_number(text: str) -> int:
    """A seed from 0 to 2**31 - 1, for argparse: every generator takes those, times 10,000 too."""
    if not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**31 - 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    recipes = "; ".join(f"{name}: {r.epochs} epochs, batch {r.batch_size}, lr {r.lr}" for name, r in RECIPES.items())
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="fast", help="a named set of values (default: %(default)s)")
    add("--out", type=Path, metavar="FILE",
        help="the weights (default: weights.pkl; with --validate, weights.pkl in the run's directory)")
    add("--run-dir", type=Path, metavar="DIR",
        help="log, graphs and checkpoint (default: runs/RECIPE-seedSEED, and -validate behind it with --validate)")
    add("--epochs", type=positive(float), metavar="N",
        help=f"passes through the enlarged set, 0.5 for half of one; the schedule stretches (default: {recipes})")
    add("--batch-size", type=positive(int), metavar="N", help="images a step (default: the recipe's)")
    add("--lr", type=positive(float), metavar="X", help="the highest learning rate (default: the recipe's)")
    add("--set", type=recipe_value, action="append", default=[], metavar="NAME=VALUE", dest="values",
        help="any other value of the recipe, such as --set weight_decay=0")
    add("--seed", type=seed_number, default=0, metavar="N",
        help="of weights, augmentation, order and dropout (default: 0)")
    add("--teachers", type=Path, nargs="+", default=[], metavar="FILE",
        help="weights of networks whose mean probabilities are learnt instead of the labels (default: none)")
    add("--validate", action="store_true",
        help="for choosing values: train on the first 45,000 training images, measure on the last 5,000 (default: off)")
    add("--resume", action="store_true", help="go on from the last finished epoch of the run (default: off)")
    add("--plots-only", action="store_true", help="draw the graphs from the run's metrics.csv (default: off)")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    changes = {name: value for name, value in given.items() if value is not None} | dict(args.values)
    return dataclasses.replace(RECIPES[args.recipe], **changes)


def read_checkpoint(path: Path, settings: dict) -> dict:
    """The checkpoint at `path`, if it is of a run with these settings.

    Raises:
        ModelError: it is missing, damaged, or of other settings.
    """
    checkpoint = read_archive(path, "train without --resume")
    saved = checkpoint.get("settings", {}) if isinstance(checkpoint, dict) else {}
    names = sorted(name for name in settings.keys() | saved.keys() if saved.get(name) != settings.get(name))
    if names:
        differences = ", ".join(f"{name} {saved.get(name)} there, {settings.get(name)} here" for name in names)
        raise ModelError(
            f"{path} is of another run ({differences}): give the options of that run, or another --run-dir"
        )
    return checkpoint


def describe(facts: dict) -> str:
    """What weights are of, in a few words, from the facts saved beside them."""
    return (f"{facts['network']}, recipe {facts.get('recipe')}, seed {facts.get('seed')}, "
            f"{facts.get('epochs', math.nan):g} epochs, {facts.get('accuracy', math.nan):.2f} %")


def load_teacher(path: Path, validate: bool) -> tuple[nn.Module, dict]:
    """As `load_weights`; with `validate`, only weights that were trained with it too.

    Raises:
        ModelError: there are no such weights, or they have learnt from the held-out images.
    """
    teacher, facts = load_weights(path)
    if validate and not facts.get("validate"):
        raise ModelError(f"{path} has learnt from the held-out images: with --validate, name teachers trained with it")
    return teacher, facts


def describe_weights(path: Path) -> str | None:
    """What the weights at `path` are of; None where there are none."""
    try:
        return describe(load_weights(path)[1])
    except ModelError:
        return None


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    recipe = recipe_of(args)
    run_dir = args.run_dir or Path(f"runs/{args.recipe}-seed{args.seed}" + "-validate" * args.validate)
    if args.plots_only:
        plot_run(run_dir)
        print(f"drawn: {run_dir / 'accuracy.png'}, {run_dir / 'loss.png'}")
        return 0
    out = args.out or (run_dir / "weights.pkl" if args.validate else Path("weights.pkl"))
    device = pick_device(args.device)
    for folder in (run_dir, out.parent):  # better now than after the training
        folder.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ModelError(f"{out} cannot be written: name another file with --out")

    train, test = load_training_data(args.data_dir, args.validate)
    recipe = dataclasses.replace(  # as far as this machine can follow it
        recipe, compile=recipe.compile and can_compile(device), bfloat16=recipe.bfloat16 and has_bfloat16(device))
    taught_by = [load_teacher(path, args.validate) for path in args.teachers]
    settings = {"recipe": args.recipe, **dataclasses.asdict(recipe), "seed": args.seed, "validate": args.validate,
                "teachers": [describe(facts) for _, facts in taught_by]}
    path = run_dir / "checkpoint.pt"
    checkpoint = read_checkpoint(path, settings) if args.resume else {}
    rows, seconds_before = checkpoint.get("rows", []), checkpoint.get("seconds", 0.0)
    torch.backends.cudnn.deterministic = True  # so that a resumed run is the uninterrupted one on CUDA too
    torch.manual_seed(args.seed)  # for the initial weights
    network = build_network(recipe.network, dropout=recipe.dropout).to(device)
    print(f"enlarging {len(train.images):,} training images to {3 * len(train.images):,} ...", flush=True)
    train = enlarge(train, args.seed * 10_000, recipe.max_degrees, recipe.together, recipe.augment_turned)
    if not args.resume:  # nothing of an earlier run in this directory is to be taken for this one's
        for name in ("checkpoint.pt", "metrics.csv", "result.json", "accuracy.png", "loss.png"):
            (run_dir / name).unlink(missing_ok=True)
    trainable, total = count_parameters(network)
    measured = "held-out" if args.validate else "test"
    print(
        f"recipe {args.recipe}, seed {args.seed}: {trainable:,} trainable of {total:,} parameters; "
        f"{len(train.images):,} training samples, {len(test.images):,} {measured} images\n"
        f"device {device}, {torch.get_num_threads()} threads, {'' if recipe.compile else 'not '}compiled, "
        f"{'bfloat16' if recipe.bfloat16 else 'float32'}; "
        f"log and graphs go to {run_dir}, weights to {out}\n" + TABLE_HEAD.format(measured[:4]), flush=True,
    )
    for row in rows:
        print(table_line(row, recipe.epochs))
    teachers = [teacher.to(device) for teacher, _ in taught_by]
    epochs = fit(network, train.to(device), test.to(device), recipe, teachers, args.seed, checkpoint)
    for row, state in epochs:
        if not math.isfinite(row["train_loss"]):
            raise ModelError(f"the loss is {row['train_loss']} in epoch {row['epoch']}: try a smaller --lr")
        rows = [*rows, row]
        seconds = seconds_before + time.perf_counter() - started
        with replacing(path) as part:
            torch.save({"settings": settings, "rows": rows, "seconds": seconds, **state}, part)
        write_csv(run_dir / "metrics.csv", rows)
        print(table_line(row, recipe.epochs), flush=True)

    write_csv(run_dir / "metrics.csv", rows)  # a kill right behind the last checkpoint may have left it a row short
    accuracy, loss = rows[-1]["test_accuracy"], rows[-1]["test_loss"]
    replaced = describe_weights(out)
    save_weights(out, network, recipe.network, recipe=args.recipe, seed=args.seed, epochs=recipe.epochs,
                 validate=args.validate, accuracy=accuracy)
    seconds = seconds_before + time.perf_counter() - started
    result = settings | {
        "parameters": total, "accuracy": accuracy, "loss": loss, "seconds": round(seconds, 1), "device": str(device),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "numpy")},
    }
    with replacing(run_dir / "result.json") as part:
        part.write_text(json.dumps(result, indent=2) + "\n")
    plot_run(run_dir)
    print(f"{accuracy:.2f} % of the {measured} images after {recipe.epochs:g} epochs and {seconds / 60:.1f} minutes; "
          f"the weights are in {out}")
    if replaced:
        print(f"They took the place of those of {replaced}. To have the repository's back: git checkout {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return exit_status(run, make_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("\nstopped: once an epoch is finished, the same command with --resume goes on behind it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
