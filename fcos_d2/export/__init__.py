"""A trained detector as one file that runs without PyTorch."""

from .onnx import ExportError, to_onnx
from .onnx_predictor import OnnxPredictor

__all__ = ["ExportError", "OnnxPredictor", "to_onnx"]
