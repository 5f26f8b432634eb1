"""Train the networks of the ablation table that model.py does not have: FlipNet without one of its ideas.

    python docs/ablation.py --network no-flips --validate     without flip equivariance
    python docs/ablation.py --network no-gates --validate     without gates

All options are those of train.py. eval.py knows the networks of model.py only.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import train


class Conv2d(nn.Conv2d):
    """An ordinary convolution with the options of FlipConv2d."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1,
                 gain: float | None = None):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.gain = None if gain is None else nn.Parameter(torch.full((out_channels, 1, 1), gain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x if self.gain is None else self.gain * x


class NoFlips(model.FlipNet):
    """FlipNet with ordinary layers: 22, 45 and 45 channels in place of 32, 64 and 64 take 2 % more parameters."""

    def __init__(self):
        flip_layers = model.FlipConv2d, model.FlipBatchNorm2d
        model.FlipConv2d, model.FlipBatchNorm2d = Conv2d, nn.BatchNorm2d
        super().__init__((22, 45, 45), (0, 3, 4))
        model.FlipConv2d, model.FlipBatchNorm2d = flip_layers
        self.classifier = nn.Linear(45, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).mean(dim=(2, 3), dtype=torch.float32))


class NoGate(nn.Module):
    """SiLU(values(x)) in place of values(x) * SiLU(gates(x)), with as many parameters."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.values = model.FlipConv2d(channels, hidden, 1, gain=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.values(x))


class NoGates(model.FlipNet):
    """FlipNet with blocks of one branch: hidden layers of 96 channels have the parameters of two branches of 64."""

    def __init__(self):
        super().__init__((32, 64, 64), (0, 3, 4))
        for block in self.features:
            if isinstance(block, model.GatedBlock):
                block.layers[3], block.layers[4] = NoGate(64, 96), model.FlipConv2d(96, 64, 1, gain=0.0)


model.NETWORKS |= {"no-flips": NoFlips, "no-gates": NoGates}

if __name__ == "__main__":
    sys.exit(train.main())
