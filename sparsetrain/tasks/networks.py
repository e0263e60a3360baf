"""Reference networks of the sparsity literature; all take images (N, C, H, W) and return logits (N, classes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sparsetrain.errors import RecipeError


class MLP(nn.Module):
    """Fully connected ReLU network with layers ``fc1``, ``fc2``, ...; flattens its input to (N, in_features).

    Args:
        in_features: of a flattened sample.
        hidden: widths of the hidden layers; empty for a linear classifier.
        num_classes: logits.

    Raises:
        RecipeError: a width below 1.

    Example: ``MLP(64, [32, 16], 10)(images)``.
    """

    def __init__(self, in_features: int, hidden: list[int], num_classes: int) -> None:
        super().__init__()
        widths = [in_features, *hidden, num_classes]
        if min(widths) < 1:
            raise RecipeError(f"the widths of an MLP must be at least 1, got {widths}")
        self.num_classes = num_classes
        self.depth = len(widths) - 1
        for index in range(self.depth):
            self.add_module(f"fc{index + 1}", nn.Linear(widths[index], widths[index + 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for ``x`` of shape (N, ...)."""
        x = x.flatten(1)
        for index in range(1, self.depth):
            x = F.relu(self.get_submodule(f"fc{index}")(x))
        logits: Tensor = self.get_submodule(f"fc{self.depth}")(x)
        return logits


class LeNet300(MLP):
    """LeNet-300-100 (LeCun et al. 1998): 266,200 weights and 410 biases at 784 inputs and 10 classes.

    Example: ``LeNet300()(images)`` with images (N, 1, 28, 28).
    """

    def __init__(self, in_features: int = 784, num_classes: int = 10) -> None:
        super().__init__(in_features, [300, 100], num_classes)


class LeNet5Caffe(nn.Module):
    """LeNet-5 as Caffe defines it, 20-50-500: 430,500 weights at 28x28 and 10 classes (Han et al. 2015, table 4).

    Valid 5x5 convolutions, each followed by 2x2 max-pooling and nothing else; the one ReLU is after ``fc1``, as in
    Caffe's ``examples/mnist/lenet.prototxt``.

    Raises:
        RecipeError: ``image_size`` below 16, where nothing is left after the second pooling.

    Example: ``LeNet5Caffe()(images)`` with images (N, 1, 28, 28).
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise RecipeError(f"image_size={image_size} is too small for LeNet5Caffe; at least 16, or use MLP")
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for ``x`` of shape (N, in_channels, image_size, image_size)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class _ResidualBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), He et al. 2016, figure 2."""

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.growth = channels - channels_in
        self.shortcut: nn.Sequential | None = None
        if shortcut == "conv" and (stride > 1 or self.growth):
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1 or self.growth:
            before = self.growth // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.growth - before))
        return F.relu(out + x)


class SmallResNet(nn.Module):
    """CIFAR-type ResNet (He et al. 2016, section 4.2); the defaults are ResNet-20 with 269,722 parameters.

    With ``shortcut="pad"`` the parameter names and the arithmetic are those of the well-known CIFAR checkpoints of
    akamaster/pytorch_resnet_cifar10, which load with ``strict=True``.

    Args:
        depth: 6n + 2 for three stages (20, 32, 44, 56, ...): 2 convolutions in each of n blocks a stage, and 2 layers more.
        widths: channels of each stage; the second and later stages halve the resolution.
        in_channels: of the images.
        num_classes: logits.
        shortcut: "pad" (option A, no parameters) or "conv" (option B, 1x1 convolution), where the shape changes.

    Raises:
        RecipeError: no such depth, no stage, shrinking widths with "pad", or an unknown shortcut.

    Example: ``SmallResNet(depth=8, widths=[8, 16, 32])(images)`` with images (N, 3, 32, 32).
    """

    def __init__(
        self,
        depth: int = 20,
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
        num_classes: int = 10,
        shortcut: Literal["pad", "conv"] = "pad",
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or list(widths) != sorted(widths):
            raise RecipeError(f"widths={list(widths)} must be positive and must not shrink")
        if shortcut not in ("pad", "conv"):
            raise RecipeError(f"shortcut={shortcut!r} is not known; 'pad' or 'conv'")
        blocks, rest = divmod(depth - 2, 2 * len(widths))
        if blocks < 1 or rest:
            raise RecipeError(f"depth={depth} does not fit: with {len(widths)} stages it is {2 * len(widths)} * n + 2, n >= 1")
        self.num_classes = num_classes
        self.stages = len(widths)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for stage, width in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(_ResidualBlock(channels, width, 2 if stage and not block else 1, shortcut))
                channels = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for ``x`` of shape (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
