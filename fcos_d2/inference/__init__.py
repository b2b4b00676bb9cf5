"""Detections of a trained model: in Python, and as the command ``fcos predict``."""

from .batches import run_in_batches
from .drawing import draw_instances
from .predictor import Predictor

__all__ = ["Predictor", "draw_instances", "run_in_batches"]
