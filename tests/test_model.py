"""The networks against hand-made tables, the limit, and the weights file."""

import itertools
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import METADATA, make_arrays
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eval
import model
import train
from data import UserError, normalize
from model import FlipBatchNorm2d, FlipConv2d, SwiGLU, build_network, load_weights, save_weights

KINDS = ["plain", "report", "gated", "gated32-4k"]
# The report's layers by hand: (in channels, out channels, size of the output map).
REPORT_CONVOLUTIONS = [
    (3, 3, 32), (3, 10, 32), (10, 10, 32), (10, 10, 32), (10, 30, 32), (30, 30, 32), (30, 30, 16), (30, 60, 8),
]


def test_report_network_is_the_reports():
    network = build_network("report")
    found = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, inputs, output: found.append((m.in_channels, m.out_channels, output.shape[-1])))
    output = network(torch.randn(2, 3, 32, 32))
    convolution = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [type(module).__name__ for module in [*network.features, *network.classifier]] == [
        *6 * convolution, "AvgPool2d", *convolution, "MaxPool2d", *convolution, "MaxPool2d",
        "Flatten", "Dropout", "Linear"]
    assert network.classifier[1].p == 0.2
    assert found == REPORT_CONVOLUTIONS
    assert output.shape == (2, 10)


def test_report_network_parameters():
    by_hand = sum(9 * i * o + o + 2 * o for i, o, _ in REPORT_CONVOLUTIONS) + 960 * 10 + 10
    assert by_hand == 47_410 == model.count_parameters(build_network("report"))


@pytest.mark.parametrize("name, parameters, size, millions", [
    ("plain", 45_066, 32, 8.1), ("report", 47_410, 32, 16.4), ("gated", 47_866, 32, 14.6), ("gated", 47_866, 16, 3.6),
    ("gated32", 49_586, 32, 32.0)])
def test_networks_have_the_parameters_and_multiply_adds_that_model_py_names(name, parameters, size, millions):
    network = build_network(name).eval()
    assert model.count_parameters(network) == parameters
    if size == 32:
        assert f"{parameters:,} parameters, {millions} million multiply-adds" in Path(model.__file__).read_text()
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, size, size))
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", model.NETWORKS)
def test_the_table_of_layers_against_pytorchs_counter(name, capsys):
    network = build_network(name)
    with FlopCounterMode(display=False, depth=10) as counter:
        network.eval()(torch.randn(1, 3, 32, 32))
    flops = {path.partition(".")[2]: sum(of_module.values()) for path, of_module in counter.get_flop_counts().items()}
    rows = model.layer_table(network)
    assert [row[0] for row in rows] == [name for name, module in network.named_modules() if not list(module.children())]
    for layer, _, _, parameters, multiply_adds in rows:
        assert 2 * multiply_adds == flops.get(layer, 0), layer
        assert parameters == model.count_parameters(network.get_submodule(layer))
    model.main([name])
    out = capsys.readouterr().out
    assert out.splitlines()[-1].split() == [
        "sum", f"{model.count_parameters(network):,}", f"{counter.get_total_flops() // 2:,}"]
    assert len(out.splitlines()) == len(rows) + 5


def test_tables_of_all_networks(capsys):
    model.main([])
    out = capsys.readouterr().out
    assert all(f"\n{name}\n" in out for name in model.NETWORKS)
    with pytest.raises(SystemExit):
        model.main(["other"])
    assert "invalid choice: 'other'" in capsys.readouterr().err


def test_the_table_of_a_layer_that_is_applied_twice_and_a_parameter_of_no_layer():
    network = nn.Sequential(convolution := nn.Conv2d(3, 3, 3), convolution, nn.Flatten(), nn.Linear(2352, 10))
    network.scale = nn.Parameter(torch.ones(7))
    assert [row[1:] for row in model.layer_table(network)] == [
        ("Conv2d", "3x30x30", 84, 72_900), ("Conv2d", "3x28x28", 0, 63_504), ("Flatten", "2352", 0, 0),
        ("Linear", "10", 23_530, 23_520), ("", "", 7, 0)]


class Last(nn.Module):
    def forward(self, results):
        return results[0][:, -1]


def test_the_table_of_a_layer_that_returns_no_tensor():
    network = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 1), nn.LSTM(1024, 10, batch_first=True), Last())
    assert [row[1:] for row in model.layer_table(network)] == [
        ("Flatten", "3x1024", 0, 0), ("Conv1d", "4x1024", 16, 12_288), ("LSTM", "", 41_440, 0), ("Last", "10", 0, 0)]


class Linear(nn.Module):
    """Logits by a linear layer: 30,730 parameters. `extra` more that take no part."""

    def __init__(self, extra: int = 0, before=None, after=None):
        super().__init__()
        self.before, self.linear, self.after = before or nn.Identity(), nn.Linear(3072, 10), after or nn.Identity()
        self.extra = nn.Parameter(torch.zeros(extra))

    def forward(self, images):
        return self.after(self.linear(self.before(images.flatten(1))))


class Keeps(Linear):
    """Its activations would be shared by the threads of the evaluation."""

    def forward(self, images):
        self.kept = super().forward(images)
        return self.kept


class LooksInside(nn.Module):
    """Export folds the norm into the convolution, whose output is then another."""

    def __init__(self, init=lambda weight: None):
        super().__init__()
        self.layers, self.last = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), nn.Linear(10, 10)
        init(self.last.weight)

    def forward(self, images):
        maps = self.layers[0](images)
        return self.last(torch.cat([maps, self.layers[1](maps)], dim=1).amax(dim=(2, 3)))


class UsesTheKernel(nn.Module):
    """Export replaces the flip-equivariant layer, and its methods."""

    def __init__(self):
        super().__init__()
        self.layer = FlipConv2d(3, 10, 3)

    def forward(self, images):
        return F.conv2d(images, self.layer.kernel()).mean(dim=(2, 3))


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1))

    def forward(self, images):
        return self.layers(images).squeeze()


class AlwaysDrops(nn.Module):
    def forward(self, images):
        return F.dropout(images, 0.3)


class ChangesItsInput(nn.Module):
    def forward(self, images):
        images -= 0.5
        return images


class MixesImages(nn.Module):
    def forward(self, images):
        return images - images.mean(dim=0)


class ScalesByItsNorm(nn.Module):
    """Export leaves out the norm, whose weights are one at first."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10))

    def forward(self, images):
        x = self.layers[0](images)
        if isinstance(self.layers[1], nn.BatchNorm2d):
            x = x * self.layers[1].weight[:, None, None]
        return x.mean(dim=(2, 3))


class HasExtraState(nn.Identity):
    def get_extra_state(self):
        return {"steps": 1}


class InitialisesInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, images):
        if self.training and self.scale is None:
            self.scale = images.std().detach()
        return images


class KeepsByHook(Linear):
    """The hook of a copy writes to the original."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.linear.register_forward_hook(lambda module, inputs, output: self.kept.update(output=output))


class Overflows(nn.Module):
    def forward(self, images):
        return images * math.inf


class InHalf(nn.Module):
    def forward(self, x):
        return x.half().float() if x.shape[1] > 10 else x.half()


class StaysPositive(nn.Module):
    """Its parameter stands under a root."""

    def __init__(self):
        super().__init__()
        self.floor = nn.Parameter(torch.full((1, 3072), 0.05))

    def forward(self, images):
        return images / (0.1 * images.square().mean(dim=1, keepdim=True) + self.floor).sqrt()


class Shuffles(nn.Module):
    """Another order in each process, and in no file."""

    def __init__(self):
        super().__init__()
        self.order = torch.randperm(3072)

    def forward(self, images):
        return images[:, self.order]


class SubtractsItsMean(nn.Module):
    """A norm whose running mean is in an attribute."""

    mean = torch.zeros(3072)

    def forward(self, images):
        if self.training:
            self.mean = self.mean.lerp(images.mean(dim=0), 0.1)
        return images - self.mean


class Projects(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("slice", torch.zeros(1400, 3072)[:10])  # a file holds the whole tensor

    def forward(self, images):
        return images


class Pair(nn.Module):
    def forward(self, images):
        return images, images


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("build, message", [
    (lambda: Linear(19_270), None),  # 50,000 parameters
    (lambda: Linear(after=nn.LogSoftmax(dim=1)), None),  # harmless: log-probabilities are logits
    (lambda: nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10)), None),
    (lambda: Linear(before=StaysPositive()), None),
    (lambda: Linear().bfloat16(), "network 'mine' fails (RuntimeError: "),
    (lambda: Linear(before=InHalf(), after=InHalf()), "network 'mine' computes in half precision: leave it in float32"),
    (lambda: Linear(19_271), "network 'mine' has 50,001 parameters, over the limit of 50,000"),
    (lambda: Linear(after=nn.Unflatten(1, (10, 1))), "two images to [2, 10, 1]: it must return logits of"),
    (lambda: Linear(after=Pair()), "maps one image to tuple, two images to tuple: it must return logits"),
    (lambda: Squeezed(), "maps one image to [10], two images to [2, 10]: it must return logits of shape [1, 10]"),
    (lambda: Linear(after=nn.Softmax(dim=1)), "returns probabilities: leave out its softmax"),
    (lambda: Linear(before=nn.Linear(99, 3072)), "network 'mine' fails (RuntimeError: mat1 and mat2 shapes cannot be"),
    (lambda width: None, "network 'mine' fails (TypeError: "),
    (lambda: Keeps(), "network 'mine' fails (an attribute is a computed tensor, such as a kept activation"),
    (lambda: KeepsByHook(), "network 'mine' fails (an attribute is a computed tensor, such as a kept activation"),
    (lambda: Linear(after=nn.utils.weight_norm(nn.Linear(10, 10))), "or a weight of torch.nn.utils.weight_norm"),
    (lambda: Linear(before=HasExtraState()), "network 'mine' must have a state_dict() of tensors"),
    (lambda: Linear(before=InitialisesInTraining()), "network 'mine' must have a state_dict() of tensors"),
    (lambda: Linear(before=MixesImages()), "network 'mine' returns different logits for an image alone and in a batch"),
    (lambda: Linear(after=Overflows()), "network 'mine' returns logits that are not finite"),
    (lambda: ScalesByItsNorm(), "network 'mine' uses what a convolution returns before its batch norm"),
    (lambda: UsesTheKernel(), "network 'mine' fails (AttributeError: 'Conv2d' object has no attribute 'kernel'"),
    (lambda: LooksInside(), "network 'mine' uses what a convolution returns before its batch norm"),
    (lambda: LooksInside(nn.init.zeros_), "network 'mine' uses what a convolution returns before its batch norm"),
    (lambda: Linear(before=AlwaysDrops()), "different logits when called twice on the same images: pass training="),
    (lambda: Linear(before=ChangesItsInput()), "network 'mine' returns different logits when called twice"),
    (lambda: Linear(before=Shuffles()), "network 'mine' depends on values outside its state_dict()"),
    (lambda: Linear(before=SubtractsItsMean()), "network 'mine' depends on values outside its state_dict()"),
    (lambda: Linear(before=Projects()), "network 'mine' has buffers of more than 16,000,000 bytes: make them smaller"),
    (lambda: model.FlipNet((33, 64, 64), (0, 3, 4)),
     "ValueError: a flip-equivariant layer needs an even width, not 33): correct it"),
    (lambda: model.FlipNet((32, 64, 63), (0, 3, 4)),
     "ValueError: a flip-equivariant layer needs an even width, not 63): correct it"),
])
def test_a_network_of_ones_own_is_tried_first(build, message, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "mine", build)
    if message is None:
        build_network("mine")
        return
    options = ["--network", "mine", "--data-dir", str(dataset), "--run-dir", str(tmp_path / "r")]
    assert train.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_two_networks_are_never_one(monkeypatch):
    """Else a student would be its own teacher."""
    network = model.PlainCNN()
    monkeypatch.setitem(model.NETWORKS, "mine", lambda: network)
    a, b = build_network("mine"), build_network("mine")
    assert not {parameter.data_ptr() for parameter in a.parameters()} & {p.data_ptr() for p in b.parameters()}


# --- learning -------------------------------------------------------------------------------------

def biases_before_a_norm(network: nn.Module) -> set[str]:
    """Their gradients are zero but for rounding: the norm subtracts what they add."""
    layers = dict(network.named_modules())
    names = list(layers)
    return {f"{name}.bias" for name, after in itertools.pairwise(names)
            if isinstance(layers[name], nn.Conv2d) and isinstance(layers[after], nn.BatchNorm2d)}


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    network = build_network(name)
    for parameter in network.parameters():  # the last layer of a block starts at zero and passes no gradient on
        if not parameter.any():
            nn.init.normal_(parameter)
    F.cross_entropy(network(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    cancelled = biases_before_a_norm(network)
    assert len(cancelled) == {"report": 8, "plain": 6}.get(name, 0)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name not in cancelled:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-5, parameter_name


@pytest.mark.parametrize("name", KINDS)
def test_loss_falls_on_one_batch(name):
    torch.manual_seed(0)
    network = build_network(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    images, labels = (torch.from_numpy(array) for array in make_arrays(32, 0))
    images, labels = normalize(images), labels.long()
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# --- flip equivariance ----------------------------------------------------------------------------

def random_network(name: str) -> nn.Module:
    """A network without zero weights, with running statistics other than 0 and 1, and no two norms alike."""
    torch.manual_seed(0)
    network = build_network(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, FlipConv2d) and module.gain is not None:
            nn.init.uniform_(module.gain, 0.5, 1.5)
    for _ in range(3):
        network(2 * torch.randn(64, 3, 32, 32) + 1)
    return network.eval()


def flip(maps: torch.Tensor) -> torch.Tensor:
    """What an equivariant layer gives for the mirror image: its maps flipped, their halves swapped."""
    return maps.flip(3).roll(maps.shape[1] // 2, dims=1)


@pytest.mark.parametrize("in_channels, kernel_size, groups", [
    (3, 3, 1), (3, 5, 1), (8, 1, 1), (8, 3, 1), (8, 3, 2), (16, 3, 4), (16, 3, 16)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_layer_is_flip_equivariant(in_channels, kernel_size, groups, memory_format):
    torch.manual_seed(0)
    layer = nn.Sequential(FlipConv2d(in_channels, 16, kernel_size, groups=groups), FlipBatchNorm2d(16), nn.ReLU())
    assert layer[0].weight.numel() == 16 * in_channels // groups * kernel_size**2 // 2
    images = torch.randn(4, in_channels, 12, 12).to(memory_format=memory_format)
    mirrored = images.flip(3) if in_channels == 3 else flip(images)
    for _ in range(2):  # in training mode, then in evaluation mode
        maps = layer(images)
        assert maps.shape == (4, 16, 12, 12) and maps.std() > 0.1
        assert not torch.allclose(layer(mirrored), maps, atol=1e-2)
        assert torch.allclose(layer(mirrored), flip(maps), atol=1e-5)
        layer.eval()


def test_the_gain_scales_each_filter_and_its_mirror_image():
    layer, x = FlipConv2d(8, 6, 3, gain=1.0), torch.randn(2, 8, 5, 5)
    before = layer(x)
    layer.gain.data = torch.tensor([[2.0], [-1.0], [0.0]])
    scales = torch.tensor([2.0, -1.0, 0.0, 2.0, -1.0, 0.0])
    assert torch.allclose(layer(x), before * scales[:, None, None], atol=1e-6)
    assert torch.equal(layer.export().weight, layer.kernel())


def test_a_block_starts_as_the_identity():
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(model.GatedBlock(64)(x), x)


def test_anti_aliased_pool_is_a_mean_of_4x4_windows():
    x = torch.randn(2, 3, 8, 12)
    assert torch.allclose(model.anti_aliased_pool()(x), nn.AvgPool2d(4, stride=2, padding=1)(x), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_swiglu_against_its_formula(training):
    torch.manual_seed(0)
    gate, x = SwiGLU(8, 12), torch.randn(2, 8, 3, 5)
    before = x.clone()
    values, gates = (F.conv2d(x, layer.kernel()) for layer in (gate.values, gate.gates))
    with torch.set_grad_enabled(training):
        assert torch.allclose(gate(x), values * gates * gates.sigmoid(), atol=1e-5)
    assert torch.equal(x, before) and values.shape == (2, 12, 3, 5)


def test_an_image_and_its_mirror_image_get_the_same_logits():
    network = random_network("gated32")
    images = torch.randn(8, 3, 32, 32)
    output = network(images)
    assert output.std() > 0.1 and torch.allclose(output, network(images.flip(3)), atol=1e-4)


@pytest.mark.parametrize("name, norms_left", [("report", 0), ("gated", 1), ("gated32", 1)])
def test_export_keeps_the_output(name, norms_left):
    network = random_network(name)
    images = torch.randn(8, 3, 32, 32)
    exported = model.export(network)
    assert torch.allclose(exported(images), network(images), atol=1e-4)
    assert not any(isinstance(module, (FlipConv2d, FlipBatchNorm2d)) for module in exported.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in exported.modules()) == norms_left


@pytest.mark.parametrize("name", KINDS)
def test_export_stays_on_the_device(name):
    """The meta device stands for a GPU: it refuses tensors of the CPU as one does."""
    exported = model.export(build_network(name).to("meta"))
    assert {tensor.device.type for tensor in exported.state_dict().values()} == {"meta"}
    assert exported(torch.zeros(2, 3, 32, 32, device="meta")).device.type == "meta"


# --- the weights file -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_weights_come_back(name, tmp_path):
    network, metadata = build_network(name), METADATA | {"network": name, "seed": 3}
    save_weights(tmp_path / "w.pkl", network, metadata)
    loaded, loaded_metadata = load_weights(tmp_path / "w.pkl")
    assert loaded_metadata == metadata and not loaded.training
    pairs = zip(network.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.pkl"
    path.write_bytes(b"old")
    with pytest.raises((pickle.PicklingError, AttributeError)):  # which of them depends on the Python version
        save_weights(path, build_network("report"), {"cannot be pickled": lambda: 0})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('bomb-went-off').touch()",))


def flip_a_byte_of_a_tensor(path):
    network, _ = load_weights(path)
    contents = bytearray(path.read_bytes())
    at = contents.index(network.classifier[2].weight.detach().numpy().tobytes()[:64])
    contents[at + 10] ^= 1
    path.write_bytes(contents)


def flip_bits_of_the_directory(path):
    contents = bytearray(path.read_bytes())
    contents[contents.rfind(b"PK\x01\x02") + 9] ^= 8  # "the name is UTF-8"
    contents[contents.rfind(b"PK\x01\x02") + 8] ^= 1  # "encrypted"
    path.write_bytes(contents)


def mark_a_tensor_as_a_folder(path):
    contents = bytearray(path.read_bytes())
    contents[contents.index(b"PK\x01\x02", contents.index(b"PK\x01\x02") + 400) + 38] ^= 0x10
    path.write_bytes(contents)


def write_a_zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))


def change_metadata(**changes):
    def change(path):
        contents = torch.load(path, weights_only=True)
        torch.save(contents | {"metadata": contents["metadata"] | changes}, path)
    return change


def change_state(state):
    return lambda path: torch.save(torch.load(path, weights_only=True) | {"state": state}, path)


BAD_WEIGHTS = {
    "missing": (lambda path: path.unlink(), "there is no file"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or of another format"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "is damaged or of another format"),
    "flipped byte": (flip_a_byte_of_a_tensor, "a checksum does not match"),
    "flipped bits of the directory": (flip_bits_of_the_directory, "is damaged or of another format"),
    "a tensor marked as a folder": (mark_a_tensor_as_a_folder, "a checksum does not match"),
    "too large": (change_state({"x": torch.zeros(20_000_000)}), "more than 64,000,000 bytes"),
    "too large when unpacked": (write_a_zip_bomb, "more than 64,000,000 bytes"),
    "unknown network": (change_metadata(network="other"), "model.py has no network 'other'"),
    "an earlier version's gated network": (change_metadata(network="gated 3200000x1@32"), "has no network 'gated"),
    "an earlier version's paired network": (change_metadata(network="paired 32x99999999@32"), "has no network"),
    "network of another type": (change_metadata(network=["report"]), "has no valid description of its network"),
    "epochs of another type": (change_metadata(epochs="twenty"), "has no valid description of its network"),
    "control characters": (change_metadata(recipe="\x1b[31mred"), "has no valid description of its network"),
    "control characters in the network": (change_metadata(network="\x1b[31mred"), r"has no network '\x1b[31mred'"),
    "a long recipe": (change_metadata(recipe="fast" * 1000), "has no valid description of its network"),
    "more metadata": (change_metadata(other=1), "has no valid description of its network"),
    "other shapes": (change_state(nn.Linear(3, 3).state_dict()), "do not fit the network 'report'"),
    "no tensors": (change_state({"features.0.weight": 3}), "do not fit the network 'report'"),
    "a state of another type": (change_state(3), "do not fit the network 'report'"),
    "no metadata": (lambda path: torch.save({"state": {}}, path), "holds 'state', not metadata, state"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds 'Tensor', not metadata, state"),
    "a pickle that runs code": (lambda path: torch.save({"metadata": {}, "state": Bomb()}, path), "could run code"),
    "a bare pickle that runs code": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "is damaged or of another"),
}


def test_a_file_that_may_not_be_read_is_not_called_damaged(weights, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model.zipfile, "ZipFile", refuse)
    with pytest.raises(UserError, match="cannot be read: change its permissions, or copy it$"):
        load_weights(weights)


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_one_sentence_and_status_2(case, weights, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    damage, message = BAD_WEIGHTS[case]
    damage(weights)
    assert eval.main(["--weights", str(weights)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert error.strip().isprintable() and len(error) < 600
    assert not (tmp_path / "bomb-went-off").exists()


def test_random_damage_is_one_sentence_and_status_2(weights, capfd):
    whole, generator = weights.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(60):
        damaged = bytearray(whole)
        # the last 12,000 bytes are the zip directory; the first 8,000 hold the pickle
        for at in torch.randint(0, 20_000, (3,), generator=generator).tolist():
            damaged[at - 12_000] ^= int(torch.randint(1, 256, (), generator=generator))
        weights.write_bytes(damaged)
        try:
            load_weights(weights)  # a change of a field that nobody reads
        except UserError as error:
            assert str(error).isprintable()
    assert capfd.readouterr() == ("", "")


def test_weights_over_the_limit(weights, monkeypatch, capsys):
    monkeypatch.setattr(model, "PARAMETER_LIMIT", 47_409)
    assert eval.main(["--weights", str(weights)]) == 2
    assert "'report' has 47,410 parameters, over the limit of 47,409" in capsys.readouterr().err
