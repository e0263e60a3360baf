"""Lightning modules that say what is learned, and the reference networks."""

from __future__ import annotations

from sparsetrain.tasks.causal_lm import CausalLM
from sparsetrain.tasks.classification import Classification
from sparsetrain.tasks.incremental import IncrementalClassification
from sparsetrain.tasks.networks import MLP, LeNet5Caffe, LeNet300, SmallResNet
from sparsetrain.tasks.perplexity import Perplexity, perplexity
from sparsetrain.tasks.policy import PolicyGradient
from sparsetrain.tasks.pretrained import save_pretrained
from sparsetrain.tasks.sequence_classification import SequenceClassification
from sparsetrain.tasks.training import Task, lr_factor

__all__ = [
    "MLP",
    "CausalLM",
    "Classification",
    "IncrementalClassification",
    "LeNet5Caffe",
    "LeNet300",
    "Perplexity",
    "PolicyGradient",
    "SequenceClassification",
    "SmallResNet",
    "Task",
    "lr_factor",
    "perplexity",
    "save_pretrained",
]
