"""What a sparse model is worth outside of training: the formats that run, and how fast they are, measured."""

from sparsetrain.errors import ExportError
from sparsetrain.export.compacted import as_ordinary, load_compact, save_compact
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
    "as_ordinary",
    "compare",
    "for_inference",
    "load_compact",
    "measure_speed",
    "race",
    "run_on",
    "save_compact",
]
