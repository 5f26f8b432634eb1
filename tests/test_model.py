"""The networks against hand-made tables, the limit, and the weights file."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import make_arrays
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
from data import normalize
from model import (
    GatedBlock,
    ModelError,
    PairedBlock,
    PairedConv,
    PairedGate,
    PairedNormActivation,
    build_network,
    check_limit,
    count_parameters,
    fold_batch_norm,
    load_weights,
    save_weights,
)
from train import RECIPES

NETWORKS = ["report", "paired 64x2@16 96x1@8", "gated 32x1@32 64x1@16 64x1@8"]

# The report's layers by hand: (channels in, channels out, size of the map it computes).
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
        "Flatten", "Dropout", "Linear", "LogSoftmax"]
    assert network.classifier[1].p == 0.2
    assert found == REPORT_CONVOLUTIONS
    assert output.shape == (2, 10)
    assert torch.allclose(output.exp().sum(dim=1), torch.ones(2), atol=1e-5)


def test_report_network_parameters():
    by_hand = sum(9 * i * o + o + 2 * o for i, o, _ in REPORT_CONVOLUTIONS) + 960 * 10 + 10
    assert by_hand == 47_410
    assert count_parameters(build_network("report")) == (by_hand, by_hand)


@pytest.mark.parametrize("recipe, parameters, side, millions", [
    ("fast", 49_034, 32, 14.4), ("fast", 49_034, 16, 3.6), ("best", 47_418, 32, 14.6)])
def test_recipes_have_the_parameters_and_multiply_adds_that_the_readme_states(recipe, parameters, side, millions):
    network = build_network(RECIPES[recipe].network).eval()
    assert count_parameters(network) == (parameters, parameters)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, side, side))
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, abs=0.05)


def test_frozen_parameters_count_too():
    network = build_network("report")
    network.features[0].weight.requires_grad_(False)
    assert count_parameters(network) == (47_410 - 81, 47_410)


def test_limit():
    just_fits = nn.Linear(49_999, 1)
    assert check_limit(just_fits) is just_fits
    with pytest.raises(ModelError, match=r"50,001 parameters, 1 more than the limit of 50,000"):
        check_limit(nn.Linear(50_000, 1))


def test_limit_is_asserted_where_networks_are_built(monkeypatch):
    monkeypatch.setitem(model.NETWORKS, "wide", lambda: nn.Linear(50_000, 1))
    with pytest.raises(ModelError, match="limit"):
        build_network("wide")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    network = build_network(name)
    for parameter in network.parameters():  # a block's last layer starts at zero and lets no gradient through
        if not parameter.any():
            nn.init.normal_(parameter)
    F.nll_loss(network(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    for name, parameter in network.named_parameters():
        # a bias in front of a batch norm shifts what the norm takes away again: its gradient is rounding
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_falls_on_one_batch(name):
    torch.manual_seed(0)
    network = build_network(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    images, labels = (torch.from_numpy(array) for array in make_arrays(32, 0))
    images, labels = normalize(images), labels.long()
    losses = []
    for _ in range(40):
        loss = F.nll_loss(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def trained_a_little(name: str) -> nn.Module:
    """A network without weights of zero, its running statistics not 0 and 1, its norms not all the same."""
    torch.manual_seed(0)
    network = build_network(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, PairedConv):
            nn.init.normal_(module.weight, std=0.1)
    for _ in range(3):
        network(2 * torch.randn(64, 3, 32, 32) + 1)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_output(name):
    network = trained_a_little(name)
    images = torch.randn(8, 3, 32, 32)
    folded = fold_batch_norm(network)
    behind_no_convolution = 0 if name == "report" else 1
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == behind_no_convolution
    assert torch.allclose(folded(images), network(images), atol=1e-4)


def mirrored_pairs(maps: torch.Tensor) -> torch.Tensor:
    """What a paired layer gives for the mirrored image: its maps mirrored, their halves exchanged."""
    return maps.flip(3).roll(maps.shape[1] // 2, dims=1)


@pytest.mark.parametrize("channels_in, size, stride, groups", [
    (3, 3, 1, 1), (3, 4, 2, 1), (8, 1, 1, 1), (8, 3, 1, 1), (8, 3, 1, 2), (16, 3, 1, 4), (8, 2, 2, 1)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_paired_layer_keeps_the_mirror(channels_in, size, stride, groups, memory_format):
    torch.manual_seed(0)
    layer = nn.Sequential(PairedConv(channels_in, 16, size, stride, groups), PairedNormActivation(16))
    assert layer[0].weight.numel() == 16 * channels_in // groups * size**2 // 2
    images = torch.randn(4, channels_in, 12, 12).to(memory_format=memory_format)
    other = images.flip(3) if channels_in == 3 else mirrored_pairs(images)
    for _ in range(2):  # first as trained, then as tested
        maps = layer(images)
        assert maps.shape == (4, 16, 12 // stride, 12 // stride) and maps.std() > 0.1
        assert not torch.allclose(layer(other), maps, atol=1e-2)
        assert torch.allclose(layer(other), mirrored_pairs(maps), atol=1e-5)
        layer.eval()


@pytest.mark.parametrize("block", [PairedBlock, GatedBlock])
def test_a_block_starts_as_the_identity(block):
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(block(64)(x), x)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_gate_against_its_formula(memory_format):
    x = torch.randn(2, 8, 3, 5).to(memory_format=memory_format)  # [values, gates] of one half, then of the other
    by_hand = torch.cat([x[:, 0:2] * F.silu(x[:, 2:4]), x[:, 4:6] * F.silu(x[:, 6:8])], dim=1)
    assert torch.allclose(PairedGate()(x), by_hand, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS[1:])
def test_an_image_and_its_mirror_image_are_the_same_to_paired_networks(name):
    network = trained_a_little(name)
    images = torch.randn(8, 3, 32, 32)
    output = network(images)
    assert output.std() > 0.1 and torch.allclose(output, network(images.flip(3)), atol=1e-4)


@pytest.mark.parametrize("name, message", [
    ("report 64x3@16", "no network named"),
    ("paired", "needs stages"),
    ("paired 64", "'64' is no stage behind 3 channels at 32x32"),
    ("paired 48x1@16", "a multiple of 32"),
    ("paired 64x1@8", "the side 32 or 16 at first"),
    ("paired 64x1@16 64x1@16", "is no stage behind 64 channels at 16x16"),
])
def test_networks_that_cannot_be(name, message):
    with pytest.raises(ModelError, match=message):
        build_network(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_back(name, tmp_path):
    network = build_network(name)
    save_weights(tmp_path / "w.pkl", network, name, recipe="report", seed=3, accuracy=81.5)
    loaded, facts = load_weights(tmp_path / "w.pkl")
    assert facts == {"network": name, "recipe": "report", "seed": 3, "accuracy": 81.5}
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values()))


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.pkl"
    path.write_bytes(b"old")
    with pytest.raises((pickle.PicklingError, AttributeError)):  # which of them is up to the Python version
        save_weights(path, build_network("report"), "report", unpicklable=lambda: 0)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def flip_a_byte_of_a_tensor(path):
    network, _ = load_weights(path)
    data = bytearray(path.read_bytes())
    at = data.index(network.classifier[2].weight.detach().numpy().tobytes()[:64])
    data[at + 10] ^= 1
    path.write_bytes(data)


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('bomb-went-off').touch()",))


def flip_a_bit_of_the_directory(path):
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x01\x02") + 9] ^= 8  # "the name is UTF-8"
    data[data.rfind(b"PK\x01\x02") + 8] ^= 1  # "encrypted"
    path.write_bytes(data)


def call_a_tensor_a_folder(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 400) + 38] ^= 0x10
    path.write_bytes(data)


def write_other(path, **changes):
    contents = torch.load(path, weights_only=True)
    torch.save(contents | changes, path)


BAD_WEIGHTS = {
    "missing": (lambda path: path.unlink(), "there is no file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or no weights file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "damaged or no weights file"),
    "flipped byte": (flip_a_byte_of_a_tensor, "damaged or no weights file"),
    "flipped bits of the directory": (flip_a_bit_of_the_directory, "damaged or no weights file"),
    "a tensor called a folder": (call_a_tensor_a_folder, "damaged or no weights file"),
    "unknown network": (lambda path: write_other(path, network="other"), "no network named 'other'"),
    "network of another kind": (lambda path: write_other(path, network=["report"]), "no network named"),
    "other shapes": (lambda path: write_other(path, state=nn.Linear(3, 3).state_dict()), "does not fit ReportNet"),
    "no state": (lambda path: torch.save({"network": "report"}, path), "holds no weights of this project"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds no weights of this project"),
    "a pickle that runs code": (lambda path: torch.save({"network": "report", "state": Bomb()}, path), "run code"),
    "a bare pickle that runs code": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "damaged or no weights"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_one_sentence_and_status_2(case, weights, tmp_path, monkeypatch, capsys):
    import eval

    monkeypatch.chdir(tmp_path)
    spoil, message = BAD_WEIGHTS[case]
    spoil(weights)
    assert eval.main(["--weights", str(weights)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "bomb-went-off").exists()


def test_weights_over_the_limit(weights, monkeypatch, capsys):
    import eval

    monkeypatch.setattr(model, "PARAMETER_LIMIT", 47_409)
    assert eval.main(["--weights", str(weights)]) == 2
    assert "47,410 parameters, 1 more than the limit of 47,409" in capsys.readouterr().err
