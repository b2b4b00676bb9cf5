"""Detectron2's common/train.py, on CPU where PyTorch sees no GPU."""

import torch
from detectron2.model_zoo import get_config

train = get_config("common/train.py").train
train.device = "cuda" if torch.cuda.is_available() else "cpu"
