"""Detectron2's common/data/coco.py as in Base-FCOS.yaml: one size, boxes with fractions."""

from detectron2.model_zoo import get_config

from fcos_d2.data import DatasetMapper

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper._target_ = dataloader.test.mapper._target_ = DatasetMapper
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
