"""fcos_R_50_FPN_1x.yaml as a LazyConfig, for Detectron2's tools/lazyconfig_train_net.py."""

from detectron2.model_zoo import get_config

from ..common.data import dataloader  # noqa: F401  part of the config
from ..common.models.fcos import model  # noqa: F401  part of the config
from ..common.train import train

optimizer = get_config("common/optim.py").SGD
optimizer.lr = 0.01
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
