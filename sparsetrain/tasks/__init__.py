"""Lightning modules that say what is learned, and the reference networks."""

from __future__ import annotations

from sparsetrain.tasks.classification import Classification, lr_factor
from sparsetrain.tasks.networks import MLP, LeNet5Caffe, LeNet300, SmallResNet

__all__ = ["MLP", "Classification", "LeNet5Caffe", "LeNet300", "SmallResNet", "lr_factor"]
