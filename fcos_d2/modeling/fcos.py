"""The meta architecture: backbone, head, then losses or detections (1904.01355, figure 2)."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ..runtime import Runtime, inference_parts, to_device
from .assignment import Assigner, build_assigner
from .assignment.candidates import Targets, check_classes, make_targets
from .head import HeadOutputs, select_levels
from .heads import Head, build_head, check_locations
from .images import checked_images
from .losses import FCOSLoss
from .normalizers import Normalizers
from .points import Levels
from .post_processing import FCOSPostProcessor
from .validation import check_same, values_of_keys


@META_ARCH_REGISTRY.register()
class FCOS(DenseDetector):
    """Fully convolutional one-stage detector (arXiv 1904.01355, 2006.09214).

    Input and output are those of every Detectron2 detector.
    """

    # The layers that start anew from a checkpoint with other classes.
    class_layers = ("head.cls_logits",)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: Head,
        head_in_features: Sequence[str],
        assigner: Assigner,
        loss: FCOSLoss,
        post_processor: FCOSPostProcessor,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        location_offset: float = 0.5,
        input_format: str = "BGR",
        vis_period: int = 0,
        runtime: Runtime | None = None,
    ):
        """
        Args:
            backbone, head, assigner, loss, post_processor: the stages.
            head_in_features: the maps of the backbone that the head takes, finest first.
            num_classes: ``gt_classes`` are in [0, num_classes).
            pixel_mean, pixel_std: per channel, in the channel order of ``input_format``.
            location_offset: where in its cell a location is, in strides.
            input_format, vis_period: Detectron2's INPUT.FORMAT and VIS_PERIOD.
            runtime: precision and compilation, of this detector alone; None for float32, not
                compiled.

        Raises:
            ValueError: if the parts have different strides, locations, classes or kinds of
                quality, or if there are not as many regression ranges as levels.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.assigner = assigner
        self.loss = loss
        self.post_processor = post_processor
        self.num_classes = num_classes
        self.input_format = input_format
        self.vis_period = vis_period
        self.runtime = Runtime() if runtime is None else runtime
        levels = select_levels(backbone.output_shape(), head_in_features)
        self.levels = Levels(tuple(level.stride for level in levels), location_offset)
        assigner.check_levels(head_in_features)
        loss.check_assigner(assigner)
        qualities = {"head": head.quality, "loss": loss.quality}
        check_same("quality", qualities | {"post-processor": post_processor.quality})
        check_same("num_classes", {"head": head.num_classes, "detector": num_classes})
        check_same("strides", {"head": tuple(head.strides), "backbone": self.levels.strides})
        check_locations(head, self.levels)

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        fcos, assigner, loss = cfg.MODEL.FCOS, build_assigner(cfg), FCOSLoss(cfg)
        for part in (assigner, loss):
            part.check_parts(cfg.SOLVER.ACCUMULATE)
        return values_of_keys(cfg, "NUM_CLASSES", "LOCATION_OFFSET") | {
            "backbone": backbone,
            "head": build_head(cfg, select_levels(backbone.output_shape(), fcos.IN_FEATURES)),
            "head_in_features": fcos.IN_FEATURES,
            "assigner": assigner,
            "loss": loss,
            "post_processor": FCOSPostProcessor(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "runtime": Runtime(precision_test=fcos.PRECISION_TEST, compile=fcos.COMPILE),
        }

    def forward(
        self, batched_inputs: list[dict], normalizers: Normalizers | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """Losses in training, else the ``instances`` of each image, as every Detectron2 detector.

        Args:
            normalizers: in training on a part of a batch, from :meth:`loss_normalizers`.

        Raises:
            ValueError: for an image on CPU with NaN or infinity; in training also for missing
                annotations, a box that is not finite, or a class number outside
                [0, ``num_classes``).
        """
        if self.training:
            instances = self.ground_truth(batched_inputs)
            images = self.preprocess_image(batched_inputs)
            outputs = self.head_outputs(images)
            shapes = [tuple(x.shape[-2:]) for x in outputs.class_logits]
            rule = self.assigner.now(self.loss.training)
            targets = make_targets(rule, self.levels, shapes, instances, outputs)
            self._log_training(batched_inputs, images, outputs, targets)
            return self.loss(outputs, targets.to(self.device), normalizers)
        found = self.candidates(self.preprocess_image(batched_inputs))
        pairs = zip(found, batched_inputs, strict=True)
        return [{"instances": self.detect(candidates, x)} for candidates, x in pairs]

    def loss_normalizers(self, parts: Sequence[list[dict]]) -> Normalizers:
        """What the losses of each part of this process's images are divided by.

        With it, the mean of the losses of all parts is the loss of one large batch. All processes
        must call it together, once a step. It runs before the backbone: where the weights of the
        losses are predictions, or the targets depend on them, there is a ValueError. For others
        see :meth:`forward`.

        Args:
            parts: training inputs, as for as many calls of :meth:`forward`.
        """
        self.assigner.check_parts(len(parts))
        ltrb = []
        for part in parts:
            # Padded as by preprocess_image, without pixels.
            padded = ImageList.from_tensors(
                [torch.empty_like(x["image"], device="meta") for x in part],
                self.backbone.size_divisibility,
                padding_constraints=self.backbone.padding_constraints,
            )
            shapes = self.levels.shapes(*padded.tensor.shape[-2:])
            instances = self.ground_truth(part)
            ltrb.append(make_targets(self.assigner, self.levels, shapes, instances).ltrb)
        return self.loss.normalizers(to_device(torch.cat(ltrb), self.device), len(parts))

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Check, normalise, pad and batch the images."""
        return super().preprocess_image(checked_images(batched_inputs, self.device))

    def head_outputs(self, images: ImageList) -> HeadOutputs:
        """The head's predictions for preprocessed images."""
        return self.runtime.run(self, images.tensor)

    def dense(self, pixels: Tensor) -> HeadOutputs:
        """Backbone and head on (N, 3, H, W) normalised pixels; see :meth:`head_outputs`."""
        features = self.backbone(pixels)
        return self.head([features[f] for f in self.head_in_features])

    def candidates(self, images: ImageList) -> list[Instances]:
        """The candidates of each preprocessed image; see :meth:`FCOSPostProcessor.candidates`."""
        found = []
        for part in inference_parts(images):
            outputs = self.head_outputs(part)
            found += self.post_processor.candidates(outputs, self.levels, part.image_sizes)
        return found

    def detect(self, candidates: Instances, image_input: dict) -> Instances:
        """The detections of an image, at the "height" and "width" of the input if it has them."""
        height, width = candidates.image_size
        output_size = image_input.get("height", height), image_input.get("width", width)
        return self.post_processor.suppress(candidates, output_size)

    def ground_truth(self, batched_inputs: list[dict]) -> list[Instances]:
        """The annotations of each image, checked and on CPU.

        There the assignment runs while a GPU works on the backbone. Only a rule that sees what the
        head predicts waits for it, once.
        """
        if any("instances" not in x for x in batched_inputs):
            raise ValueError("Instance annotations are missing in training: no key 'instances'")
        instances = [x["instances"].to("cpu") for x in batched_inputs]
        check_classes(instances, self.num_classes)
        return instances

    def _log_training(
        self, batched_inputs: list[dict], images: ImageList, outputs: HeadOutputs, targets: Targets
    ) -> None:
        if not has_event_storage():
            return
        storage = get_event_storage()
        storage.put_scalar("fcos/positives_per_image", len(targets) / len(images))
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            detections = self.post_processor(outputs, self.levels, images.image_sizes)
            self.visualize_training(batched_inputs, detections)

    def __prepare_scriptable__(self):
        """Called by torch.jit.script."""
        raise NotImplementedError(
            "FCOS cannot be scripted. Export it with fcos_d2.export.to_onnx, or trace it "
            "(--export-method tracing)"
        )
