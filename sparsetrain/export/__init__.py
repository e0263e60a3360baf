"""What a sparse model is worth outside of training: the formats that run, and how fast they are, measured."""

from sparsetrain.errors import ExportError
from sparsetrain.export.formats import FORMATS, for_inference
from sparsetrain.export.inference import Choice, InferenceModel, LayerFormat
from sparsetrain.export.speed import Sample, Speed, compare, measure_speed, race, run_on

__all__ = [
    "FORMATS",
    "Choice",
    "ExportError",
    "InferenceModel",
    "LayerFormat",
    "Sample",
    "Speed",
    "compare",
    "for_inference",
    "measure_speed",
    "race",
    "run_on",
]
