"""A trained detector as one file that runs without PyTorch."""

from ..inference.onnx_predictor import OnnxPredictor
from .int8 import quantize
from .onnx import ExportError, to_onnx

__all__ = ["ExportError", "OnnxPredictor", "quantize", "to_onnx"]
