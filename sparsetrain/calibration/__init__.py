"""Calibration: data is streamed through a model, and a criterion accumulates what it needs. Bounded memory, no Lightning.

``calibrate`` takes a whole model at once; ``Stream`` goes block by block, for `sparsetrain.oneshot`. The model's weights,
gradients, mode and buffers are as before afterwards.
"""

from __future__ import annotations

from sparsetrain.calibration.data import checksum, count_samples, first_alone, rebatch, runner, samples
from sparsetrain.calibration.driver import Block
from sparsetrain.calibration.experts import siblings, unused
from sparsetrain.calibration.layers import LayerWatch, NotShared, require_seen, require_visible
from sparsetrain.calibration.rest import agree, at_rest, is_finite, ranks, require_some, require_sums, require_whole
from sparsetrain.calibration.stacks import Segment, segments
from sparsetrain.calibration.stream import Offload, Stream, relative_error
from sparsetrain.calibration.whole import calibrate, known, watch

__all__ = [
    "Block",
    "LayerWatch",
    "NotShared",
    "Offload",
    "Segment",
    "Stream",
    "agree",
    "at_rest",
    "calibrate",
    "checksum",
    "count_samples",
    "first_alone",
    "is_finite",
    "known",
    "ranks",
    "rebatch",
    "relative_error",
    "require_seen",
    "require_some",
    "require_sums",
    "require_visible",
    "require_whole",
    "runner",
    "samples",
    "segments",
    "siblings",
    "unused",
    "watch",
]
