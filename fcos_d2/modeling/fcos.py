"""The meta architecture: backbone, head, then losses or detections (1904.01355, figure 2)."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from .compilation import compile_in_place
from .head import FCOSHead, check_choice, select_levels
from .losses import FCOSLoss, check_classes, make_targets
from .post_processing import FCOSPostProcessor
from .target_assignment import LocationAssigner
from .transfer import to_device

_PRECISIONS = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
        precision_test: str = "float32",
        compile: bool = False,
    ):
        """
        Args:
            backbone, head, assigner, loss, post_processor: the stages.
            head_in_features: the maps of the backbone that the head takes, finest first.
            num_classes: what ``gt_classes`` must be below.
            pixel_mean, pixel_std: per channel, in the channel order of ``input_format``.
            input_format, vis_period: Detectron2's INPUT.FORMAT and VIS_PERIOD.
            precision_test, compile: ``MODEL.FCOS.PRECISION_TEST`` and ``COMPILE``.

        Raises:
            ValueError: if there are not as many regression ranges as levels, or for an unknown
                precision.
        """
        check_choice("PRECISION_TEST", precision_test, list(_PRECISIONS))
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
        self.dtype_test = _PRECISIONS[precision_test]
        self.to_compile, self._compiled = compile, False
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
            "precision_test": fcos.PRECISION_TEST,
            "compile": fcos.COMPILE,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As every Detectron2 detector: losses in training, else ``instances`` of each image.

        Raises:
            ValueError: for an image on CPU with NaN or infinity; in training also for missing
                annotations, a box that is not finite, or, on CPU, a class number outside
                [0, ``num_classes``).
        """
        if not self.training:
            return self._detect(batched_inputs)
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

    def _detect(self, batched_inputs: list[dict]) -> list[dict]:
        images = self.preprocess_image(batched_inputs)
        # On CPU a batch gains nothing, and the maps of one image stay nearer to the caches.
        at_once = 1 if self.device.type == "cpu" else len(images)
        results = []
        for i in range(0, len(images), at_once):
            sizes = images.image_sizes[i : i + at_once]
            predictions = self.predict(ImageList(images.tensor[i : i + at_once], sizes))
            with torch.no_grad():
                results += self.post_processor(*predictions, self.strides, sizes)
        wanted = [
            (x.get("height", height), x.get("width", width))
            for x, (height, width) in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        return [
            {"instances": detector_postprocess(result, *size)}
            for result, size in zip(results, wanted, strict=True)
        ]

    def predict(self, images: ImageList) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """What the head says of preprocessed images; see :meth:`FCOSHead.forward`.

        The dense part: it runs in the precision, memory layout and, with ``COMPILE``, compiled
        form that are set for it. The maps come in the layout that the convolutions chose.
        """
        if self.to_compile and not self._compiled:
            # On CPU, PyTorch's own group normalization is faster than the compiled one
            # (benchmarks/NOTES.md), and little else in the head could be fused.
            on_cpu = self.device.type == "cpu"
            compile_in_place([self.backbone] if on_cpu else [self.backbone, self.head], self.device)
            self._compiled = True
        with self._autocast_test():
            x = images.tensor
            if _channels_last_helps(x.device.type):
                # Convolutions, and on CPU all that follows them, take the layout of their input.
                x = x.contiguous(memory_format=torch.channels_last)
            features = self.backbone(x)
            return self.head([features[f] for f in self.head_in_features])

    def __getstate__(self) -> dict:
        # Copies are not compiled yet.
        return {**super().__getstate__(), "_compiled": False}

    def _autocast_test(self):
        if self.training or self.dtype_test is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype_test)

    def _move_to_current_device(self, x: Tensor) -> Tensor:
        return to_device(x, self.device)

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


def _channels_last_helps(device_type: str) -> bool:
    """Whether convolutions run faster on (N, H, W, C) memory.

    On CPU always (benchmarks/NOTES.md); on GPU in half precision, whose tensor cores want it.
    There the group norms of the head return the plain layout, so it ends with the backbone.
    """
    return device_type == "cpu" or (device_type == "cuda" and torch.is_autocast_enabled("cuda"))
