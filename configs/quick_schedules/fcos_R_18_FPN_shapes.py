"""fcos_R_18_FPN_shapes.yaml as a LazyConfig, for Detectron2's tools/lazyconfig_train_net.py.

Without the YAML's gradient clipping, which LazyConfigs do not have; hence half its learning rate.
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from fcos_d2 import model_zoo
from fcos_d2.data import register_custom_datasets

from ..common.data import dataloader
from ..common.models.fcos import model
from ..common.train import train

# The data sets of a LazyConfig are registered by its code: here, those of the YAML.
register_custom_datasets(model_zoo.get_config("quick_schedules/fcos_R_18_FPN_shapes.yaml"))

# Names with an underscore stay out of the config.
_resnet = model.backbone.bottom_up
_resnet.freeze_at = 0
_resnet.stem.norm = _resnet.stages.norm = "BN"
_resnet.stages.depth = 18
del _resnet.stages.stride_in_1x1  # blocks of two 3x3 convolutions have none
model.backbone.out_channels = 64
model.backbone.top_block.update(in_channels=64, out_channels=64)
for _shape in model.head.input_shape:
    _shape.channels = 64
model.head.update(num_cls_convs=2, num_box_convs=2)
model.num_classes = 3
model.pixel_mean = [128.0, 128.0, 128.0]
model.pixel_std = [64.0, 64.0, 64.0]

for _loader, _name in ((dataloader.train, "shapes_train"), (dataloader.test, "shapes_val")):
    _loader.dataset.names = _name
    _loader.mapper.augmentations[0].short_edge_length = 128
    _loader.num_workers = 0
dataloader.train.total_batch_size = 4

optimizer = get_config("common/optim.py").SGD
optimizer.lr = 0.01
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[960, 1120], num_updates=1200
    ),
    warmup_factor=0.001,
    warmup_length=50 / 1200,
    warmup_method="linear",
)
train.update(max_iter=1200, eval_period=1200, output_dir="output/shapes_lazy")
