"""FCOS in place of the region proposal network (1904.01355, section 5)."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .assignment import Assigner, build_assigner
from .assignment.candidates import check_classes, make_targets
from .head import HeadOutputs, select_levels
from .heads import Head, build_head, check_locations
from .losses import FCOSLoss
from .points import Levels, ltrb_to_boxes
from .validation import check_same, values_of_keys


@PROPOSAL_GENERATOR_REGISTRY.register()
def FCOS(cfg, input_shape: dict[str, ShapeSpec]) -> "FCOSProposalGenerator":
    """``MODEL.PROPOSAL_GENERATOR.NAME: "FCOS"``. Detectron2 registers by the function's name."""
    return FCOSProposalGenerator(cfg, input_shape)


class FCOSProposalGenerator(nn.Module):
    """Proposals from the head, assignment and losses of FCOS, selected as the RPN selects its own.

    For GeneralizedRCNN and ProposalNetwork. The objectness of a proposal is the logarithm of its
    score, with several classes that of the best class.
    """

    @configurable
    def __init__(
        self,
        *,
        head: Head,
        in_features: Sequence[str],
        assigner: Assigner,
        loss: FCOSLoss,
        num_classes: int = 1,
        location_offset: float = 0.5,
        pre_nms_topk: tuple[int, int] = (2000, 1000),
        post_nms_topk: tuple[int, int] = (1000, 1000),
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        score_fusion: str = "sqrt",
    ):
        """
        Args:
            head, assigner, loss: the stages, as in the detector.
            in_features: the maps of the backbone that the head takes, finest first.
            num_classes: 1 learns any object against background.
            location_offset: where in its cell a location is, in strides.
            pre_nms_topk: proposals of a level that go into NMS, in training and in testing.
            post_nms_topk: proposals of an image that NMS keeps, in training and in testing.
            nms_thresh, min_box_size: as of the RPN; the size in pixels.
            score_fusion: "sqrt" or "product", of class and quality.

        Raises:
            ValueError: if the parts have different locations, classes or kinds of quality, or if
                there are not as many regression ranges as levels.
        """
        super().__init__()
        assigner.check_levels(in_features)
        loss.check_assigner(assigner)
        check_same("quality", {"head": head.quality, "loss": loss.quality})
        check_same("num_classes", {"head": head.num_classes, "proposals": num_classes})
        self.head = head
        self.levels = Levels(head.strides, location_offset)
        check_locations(head, self.levels)
        self.in_features = list(in_features)
        self.assigner = assigner
        self.loss = loss
        self.num_classes = num_classes
        self.pre_nms_topk = pre_nms_topk
        self.post_nms_topk = post_nms_topk
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.score_fusion = score_fusion

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        fcos, rpn = cfg.MODEL.FCOS, cfg.MODEL.RPN
        if fcos.QUALITY == "computed":
            raise ValueError("MODEL.FCOS.QUALITY 'computed' is not offered for proposals")
        shapes = select_levels(input_shape, fcos.IN_FEATURES)
        return values_of_keys(cfg, "IN_FEATURES", "LOCATION_OFFSET", "SCORE_FUSION") | {
            "head": build_head(cfg, shapes, num_classes=fcos.PROPOSAL_NUM_CLASSES),
            "assigner": build_assigner(cfg),
            "loss": FCOSLoss(cfg),
            "num_classes": fcos.PROPOSAL_NUM_CLASSES,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: only their sizes are read.
            features: the maps of the backbone by name.
            gt_instances: in training, with ``gt_boxes`` and ``gt_classes``.

        Returns:
            proposals: ``proposal_boxes`` and ``objectness_logits`` of each image, best first.
            losses: those of the detector in training, else none.
        """
        maps = [features[f] for f in self.in_features]
        if not self.training:
            return self._proposals(self.head(maps), images), {}
        # Before the head is queued: copying the boxes from a GPU waits for all that is queued.
        instances = self._ground_truth(gt_instances)
        outputs = self.head(maps)
        shapes = [tuple(x.shape[-2:]) for x in maps]
        rule = self.assigner.now(self.loss.training)
        targets = make_targets(rule, self.levels, shapes, instances, outputs)
        losses = self.loss(outputs, targets.to(maps[0].device))
        return self._proposals(outputs, images), losses

    def _ground_truth(self, gt_instances: list[Instances]) -> list[Instances]:
        """On CPU, what the assignment reads; the caller's instances stay as they are."""
        instances = [
            Instances(x.image_size, gt_boxes=x.gt_boxes, gt_classes=x.gt_classes).to("cpu")
            for x in gt_instances
        ]
        if self.num_classes == 1:
            for x in instances:
                x.gt_classes = torch.zeros_like(x.gt_classes)
        check_classes(instances, self.num_classes)
        return instances

    @torch.no_grad()
    def _proposals(self, outputs: HeadOutputs, images: ImageList) -> list[Instances]:
        boxes, objectness = [], []
        for level, logits in enumerate(outputs.class_logits):
            ltrb = outputs.ltrb[level]
            locations = self.levels.all_locations(level, *logits.shape[-2:], logits.device)
            boxes.append(ltrb_to_boxes(locations, ltrb.flatten(2).transpose(1, 2)))
            # The logarithm orders as the score does, and is exact for small scores too.
            log_score = logsigmoid(logits.flatten(2).amax(dim=1).float())
            if outputs.quality_logits is not None:
                log_score = log_score + logsigmoid(outputs.quality_logits[level].flatten(1).float())
                log_score = log_score / 2 if self.score_fusion == "sqrt" else log_score
            objectness.append(log_score)
        return find_top_rpn_proposals(
            boxes,
            objectness,
            images.image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[0 if self.training else 1],
            self.post_nms_topk[0 if self.training else 1],
            self.min_box_size,
            self.training,
        )
