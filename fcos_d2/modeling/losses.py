"""The losses of the detector, on dense maps and sparse positives.

Shapes: N images, C channels, (Hi, Wi) cells of level i, P positives. Dense maps are lists with an
entry for each level, in any memory layout.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from ..runtime import to_device
from .assignment import Assigner
from .assignment.candidates import Targets, gather
from .box_losses import box_losses, iou_of_ltrb, with_extent
from .class_losses import CLASS_LOSSES, class_loss
from .distributions import Distributions, distribution_focal_losses
from .head import QUALITIES, HeadOutputs
from .normalizers import NormalizedLoss, Normalizers
from .points import centerness
from .validation import check_between, check_choice, values_of_keys

# Ends the name of what a loss of some images is divided by, once those of all are added up.
DIVISOR = "/divisor"
_LARGE = 1e6  # no useful weight or exponent of a loss is larger
_LOG_PERIOD = 20  # iterations; logging waits for the GPU
_MIN_DISTANCE = 1e-6  # pixels; keeps -ln IoU and the aspect ratio finite for a box without area


class FCOSLoss(NormalizedLoss):
    """Classification, box and quality loss with their normalisers (1904.01355, eq. 2)."""

    @configurable
    def __init__(
        self,
        *,
        cls_loss_type: str = "focal",
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        box_loss_type: str = "giou",
        box_loss_weighting: str = "quality",
        quality: str = "centerness",
        loss_normalizer: str = "fg",
        cls_loss_weight: float = 1.0,
        box_loss_weight: float = 1.0,
        quality_loss_weight: float = 1.0,
        distribution_loss_weight: float = 0.25,
    ):
        """
        Args: see the keys of ``MODEL.FCOS`` in :mod:`fcos_d2.config`.

        Raises:
            ValueError: for a value that its key does not offer, and for values that do not go
                together.
        """
        super().__init__(loss_normalizer)
        check_choice("QUALITY", quality, QUALITIES)
        check_choice("BOX_LOSS_TYPE", box_loss_type, ("iou", "linear_iou", "giou", "diou", "ciou"))
        weightings = "quality", "score", "alignment", "none"
        check_choice("BOX_LOSS_WEIGHTING", box_loss_weighting, weightings)
        check_choice("CLS_LOSS_TYPE", cls_loss_type, CLASS_LOSSES)
        _check_together(quality, cls_loss_type, box_loss_weighting)
        check_between("FOCAL_LOSS_ALPHA", focal_loss_alpha, -math.inf, 1)
        # Below 1 the slope of the quality focal loss has no bound.
        lowest = 1 if cls_loss_type == "quality_focal" else 0
        check_between("FOCAL_LOSS_GAMMA", focal_loss_gamma, lowest, _LARGE)
        check_between("CLS_LOSS_WEIGHT", cls_loss_weight, 0, _LARGE)
        check_between("BOX_LOSS_WEIGHT", box_loss_weight, 0, _LARGE)
        check_between("QUALITY_LOSS_WEIGHT", quality_loss_weight, 0, _LARGE)
        check_between("DISTRIBUTION_LOSS_WEIGHT", distribution_loss_weight, 0, _LARGE)
        self.cls_loss_type = cls_loss_type
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.box_loss_type = box_loss_type
        self.box_loss_weighting = box_loss_weighting
        self.quality = quality
        self.cls_loss_weight = cls_loss_weight
        self.box_loss_weight = box_loss_weight
        self.quality_loss_weight = quality_loss_weight
        self.distribution_loss_weight = distribution_loss_weight
        # Until targets are aligned, TOOD learns as FCOS does, without a branch for centerness.
        self.until_aligned = None
        if box_loss_weighting == "alignment":
            self.until_aligned = FCOSLoss(
                focal_loss_alpha=focal_loss_alpha,
                focal_loss_gamma=focal_loss_gamma,
                box_loss_type=box_loss_type,
                loss_normalizer=loss_normalizer,
                cls_loss_weight=cls_loss_weight,
                box_loss_weight=box_loss_weight,
                distribution_loss_weight=distribution_loss_weight,
            )

    @classmethod
    def from_config(cls, cfg) -> dict:
        return values_of_keys(
            cfg, "CLS_LOSS_TYPE", "FOCAL_LOSS_ALPHA", "FOCAL_LOSS_GAMMA", "BOX_LOSS_TYPE",
            "BOX_LOSS_WEIGHTING", "QUALITY", "LOSS_NORMALIZER", "CLS_LOSS_WEIGHT",
            "BOX_LOSS_WEIGHT", "QUALITY_LOSS_WEIGHT", "DISTRIBUTION_LOSS_WEIGHT",
        )  # fmt: skip

    def forward(
        self, outputs: HeadOutputs, targets: Targets, normalizers: Normalizers | None = None
    ) -> dict[str, Tensor]:
        """
        Args:
            outputs: of a head with the same ``quality``.
            targets: on the same device.
            normalizers: of all parts of the batch, where these images are one of several parts.

        Returns:
            ``loss_fcos_cls``, ``loss_fcos_loc``, with a quality branch ``loss_fcos_ctr`` or
            ``loss_fcos_iou``, and with distributions ``loss_fcos_dfl``: float32 scalars, finite and
            connected to the maps even without positives. The mean of their gradients over all
            processes is that of the whole batch. In evaluation mode the losses are sums over the
            images, with their divisors beside them: nothing is shared with other processes, and
            the moving average stays.
        """
        if self.until_aligned is not None and not targets.are_aligned:
            return self.until_aligned(outputs, targets, normalizers)
        predicted = gather(outputs.ltrb, targets)
        if outputs.may_be_outside:
            predicted = with_extent(predicted)
        else:
            predicted = predicted.clamp(min=_MIN_DISTANCE)
        box_loss = box_losses(predicted, targets.ltrb, self.box_loss_type)
        quality = self._quality(predicted, targets)
        scores = quality if self.quality == "joint" else targets.scores
        cls_loss = class_loss(
            outputs.class_logits, targets, scores, self.cls_loss_type, self.focal_loss_alpha,
            self.focal_loss_gamma,
        )  # fmt: skip
        weights = torch.ones_like(box_loss)
        if self.box_loss_weighting == "quality":
            weights = quality
        elif self.box_loss_weighting == "score":
            logits = gather([x.detach() for x in outputs.class_logits], targets)
            weights = logits.amax(dim=1).float().sigmoid()
        elif self.box_loss_weighting == "alignment":
            weights = targets.scores
        count = weights.new_full((), len(targets))
        if targets.are_aligned:
            count = targets.scores.sum()
        if normalizers is None:
            normalizers = self.divisors(count, weights, self.box_loss_weighting != "none")
        num_positives, sum_of_weights = normalizers
        losses = {
            "loss_fcos_cls": self.cls_loss_weight * cls_loss / num_positives,
            "loss_fcos_loc": self.box_loss_weight * (box_loss * weights).sum() / sum_of_weights,
        }
        if outputs.distributions is not None:
            dfl = _distribution_losses(outputs.distributions, targets)
            dfl = (dfl * weights).sum() / sum_of_weights
            losses["loss_fcos_dfl"] = self.distribution_loss_weight * dfl
        if outputs.quality_logits is not None:
            logits = gather(outputs.quality_logits, targets)[:, 0].float()
            quality_loss = F.binary_cross_entropy_with_logits(logits, quality, reduction="sum")
            name = "loss_fcos_ctr" if self.quality == "centerness" else "loss_fcos_iou"
            losses[name] = self.quality_loss_weight * quality_loss / num_positives
            self._log_above_floor(name, quality_loss, quality, num_positives)
        if not self.training:
            weight, of_boxes = weights.sum(), ("loss_fcos_loc", "loss_fcos_dfl")
            divisors = {name: weight if name in of_boxes else count for name in losses}
            losses |= {name + DIVISOR: divisor for name, divisor in divisors.items()}
        return losses

    def _quality(self, predicted: Tensor, targets: Targets) -> Tensor | None:
        """(P,) how good each positive is: the target of the quality branch, or of the class score.

        None where nothing learns it.
        """
        if self.quality == "centerness":
            return centerness(targets.ltrb)
        if self.quality == "joint" and targets.are_aligned:
            return targets.scores
        if self.quality in ("iou", "joint"):
            iou = iou_of_ltrb(predicted.detach(), targets.ltrb)
            return targets.scores * iou if self.quality == "joint" else iou
        return None

    def normalizers(self, ltrb: Tensor, parts: int) -> Normalizers:
        """The divisors for images that come in parts. The moving average moves once.

        They depend on the targets alone, so that they are known before the head runs: with
        BOX_LOSS_WEIGHTING "quality" the weights are centerness.

        Args:
            ltrb: (P, 4) of the targets of all parts of this process, on the model's device.
            parts: how many parts.

        Raises:
            ValueError: as :meth:`check_parts`.
        """
        self.check_parts(parts)
        is_weighted = self.box_loss_weighting == "quality"
        weights = centerness(ltrb) if is_weighted else torch.ones_like(ltrb[:, 0])
        count = weights.new_full((), len(weights))
        return self.divisors(count, weights, is_weighted, parts)

    def check_assigner(self, assigner: Assigner) -> None:
        """Raise a ValueError if the loss is not made for the scores that a rule makes."""
        weighting, is_aligned = self.box_loss_weighting, assigner.makes_alignments
        if is_aligned != (weighting == "alignment"):
            found = (
                f"BOX_LOSS_WEIGHTING is {weighting!r}" if is_aligned else "ASSIGNMENT is another"
            )
            raise ValueError(
                "MODEL.FCOS.ASSIGNMENT 'task_aligned' and BOX_LOSS_WEIGHTING 'alignment' need each "
                f"other, and {found}: set both (with QUALITY 'joint' and CLS_LOSS_TYPE "
                "'quality_focal' or 'varifocal'), or neither"
            )

    def check_parts(self, parts: int) -> None:
        """Raise a ValueError if the losses of several parts are not those of one large batch."""
        if parts > 1 and self.box_loss_weighting == "score":
            raise ValueError(
                f"SOLVER.ACCUMULATE {parts} needs the sum of all weights of the box losses before "
                "the first part runs, and MODEL.FCOS.BOX_LOSS_WEIGHTING 'score' weights them by "
                "what all parts predict: set SOLVER.ACCUMULATE 1, or BOX_LOSS_WEIGHTING 'none'"
            )

    @torch.no_grad()
    def _log_above_floor(self, name: str, loss: Tensor, quality: Tensor, count: Tensor) -> None:
        """Log the quality loss less its smallest possible value, the entropy of the soft targets.

        This is near 0.6 for centerness, and a loss that stops there looks like a bug.
        """
        if not has_event_storage() or get_event_storage().iter % _LOG_PERIOD:
            return
        # Not F.binary_cross_entropy, which autocast on GPU forbids.
        floor = -(torch.xlogy(quality, quality) + torch.xlogy(1 - quality, 1 - quality)).sum()
        above_floor = ((loss - floor) / count).item()
        get_event_storage().put_scalar(f"fcos/{name}_above_floor", above_floor)


def _distribution_losses(distributions: Distributions, targets: Targets) -> Tensor:
    """(P,) distribution focal losses of the positives."""
    widths = torch.tensor(distributions.bin_widths, dtype=torch.float32)
    widths = widths.repeat_interleave(torch.tensor(targets.per_level))
    distances = targets.ltrb / to_device(widths, targets.ltrb.device)[:, None]
    return distribution_focal_losses(gather(distributions.logits, targets), distances)


def _check_together(quality: str, cls_loss_type: str, box_loss_weighting: str) -> None:
    """Raise a ValueError for keys that do not go together."""
    # Weighted by the IoU of the prediction, bad boxes would learn least.
    if box_loss_weighting == "quality" and quality != "centerness":
        others = "'score' or 'none'" if quality == "joint" else "'none'"
        raise ValueError(
            "MODEL.FCOS.BOX_LOSS_WEIGHTING 'quality' weights by centerness, and QUALITY is "
            f"{quality!r}: set BOX_LOSS_WEIGHTING {others}"
        )
    if box_loss_weighting in ("score", "alignment") and quality != "joint":
        raise ValueError(
            f"MODEL.FCOS.BOX_LOSS_WEIGHTING {box_loss_weighting!r} weights by the class score as a "
            f"measure of the box, which it is with QUALITY 'joint' alone, and QUALITY is "
            f"{quality!r}: set QUALITY 'joint', or another BOX_LOSS_WEIGHTING"
        )
    if (quality == "joint") != (cls_loss_type != "focal"):
        raise ValueError(
            f"MODEL.FCOS.CLS_LOSS_TYPE {cls_loss_type!r} and QUALITY {quality!r} do not go "
            "together: 'quality_focal' and 'varifocal' are for classes whose score is to be the "
            "IoU, which is QUALITY 'joint', and 'focal' is for classes whose score is to be 1. "
            "Change one of the two keys"
        )
