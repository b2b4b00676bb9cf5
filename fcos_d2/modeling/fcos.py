"""The meta architecture: backbone, head, then losses or detections (1904.01355, figure 2)."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from .head import FCOSHead, select_levels
from .losses import FCOSLoss, check_classes, make_targets
from .post_processing import FCOSPostProcessor
from .target_assignment import LocationAssigner


@META_ARCH_REGISTRY.register()
class FCOS(DenseDetector):
    """Fully convolutional one-stage detector (arXiv 1904.01355, 2006.09214).

    Input and output are those of every Detectron2 detector.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: FCOSHead,
        head_in_features: Sequence[str],
        assigner: LocationAssigner,
        loss: FCOSLoss,
        post_processor: FCOSPostProcessor,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        vis_period: int = 0,
    ):
        """
        Args:
            backbone, head, assigner, loss, post_processor: the stages.
            head_in_features: the maps of the backbone that the head takes, finest first.
            num_classes: what ``gt_classes`` must be below.
            pixel_mean, pixel_std: per channel, in the channel order of ``input_format``.
            input_format, vis_period: Detectron2's INPUT.FORMAT and VIS_PERIOD.

        Raises:
            ValueError: if there are not as many regression ranges as levels.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        assigner.check_levels(head_in_features)
        self.assigner = assigner
        self.loss = loss
        self.post_processor = post_processor
        self.num_classes = num_classes
        self.input_format = input_format
        self.vis_period = vis_period
        shapes = backbone.output_shape()
        self.strides = [shapes[f].stride for f in head_in_features]

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        fcos = cfg.MODEL.FCOS
        shapes: dict[str, ShapeSpec] = backbone.output_shape()
        return {
            "backbone": backbone,
            "head": FCOSHead(cfg, select_levels(shapes, fcos.IN_FEATURES)),
            "head_in_features": fcos.IN_FEATURES,
            "assigner": LocationAssigner(cfg),
            "loss": FCOSLoss(cfg),
            "post_processor": FCOSPostProcessor(cfg),
            "num_classes": fcos.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As every Detectron2 detector: losses in training, else ``instances`` of each image.

        Raises:
            ValueError: for an image on CPU with NaN or infinity; in training also for missing
                annotations, a box that is not finite, or, on CPU, a class number outside
                [0, ``num_classes``).
        """
        if not self.training:
            return super().forward(batched_inputs)
        # The ground truth stays where the data loader put it, on CPU: the assignment there runs
        # while a GPU works on the backbone, and never waits for it.
        if any("instances" not in x for x in batched_inputs):
            raise ValueError("Instance annotations are missing in training: no key 'instances'")
        instances = [x["instances"] for x in batched_inputs]
        check_classes(instances, self.num_classes)
        images = self.preprocess_image(batched_inputs)
        predictions = self.predict(images)
        level_shapes = [x.shape[-2:] for x in predictions[0]]
        targets = make_targets(self.assigner, level_shapes, self.strides, instances)
        if has_event_storage():
            storage = get_event_storage()
            storage.put_scalar("fcos/positives_per_image", len(targets.classes) / len(instances))
            if self.vis_period > 0 and storage.iter % self.vis_period == 0:
                with torch.no_grad():
                    results = self.post_processor(*predictions, self.strides, images.image_sizes)
                self.visualize_training(batched_inputs, results)
        return self.loss(*predictions, targets.to(self.device))

    def predict(self, images: ImageList) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """What the head says of preprocessed images; see :meth:`FCOSHead.forward`."""
        features = self.backbone(images.tensor)
        return self.head([features[f] for f in self.head_in_features])

    @torch.no_grad()
    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions
    ) -> list[Instances]:
        return self.post_processor(*predictions, self.strides, images.image_sizes)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        for i, x in enumerate(batched_inputs):
            image = x["image"]
            if not image.is_floating_point() or image.is_cuda:
                continue
            # The sum is finite unless an element is not: a tenth of the work of looking at each.
            if not image.sum(dtype=torch.float32).isfinite():
                name = x.get("file_name", f"number {i} of the batch")
                raise ValueError(f"The image {name} has NaN or infinite pixels")
        return super().preprocess_image(batched_inputs)
