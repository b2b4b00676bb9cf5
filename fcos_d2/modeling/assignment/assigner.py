"""What every rule of assignment offers, and how the rules that see boxes alone assign."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..head import HeadOutputs
from ..points import Levels
from .candidates import Candidates, Positives, lowest_cost_wins


class Assigner:
    """A rule that sees boxes alone, on the device of the boxes; see DynamicAssigner for others.

    Attributes:
        sees_predictions: whether the rule needs what the head predicts.
        makes_alignments: whether its scores say how well class and box go together.
    """

    sees_predictions = False
    makes_alignments = False

    def check_levels(self, levels: Sequence) -> None:
        """Raise a ValueError if the rule is not made for that many levels."""

    @property
    def settings(self) -> dict:
        """What the assignment depends on besides the geometry of the levels, ready for JSON."""
        return {}

    def check_without_model(self) -> None:
        """Raise a ValueError if there are no positives without a model that predicts."""

    def check_parts(self, parts: int) -> None:
        """Raise a ValueError if what is learnt of several parts is not that of one large batch."""

    def now(self, is_training: bool) -> "Assigner":
        """The rule for this step: another one where a training begins with it."""
        return self

    def candidates(
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> Candidates:
        """All pairs of a location and a box that it may learn.

        An ambiguous location has a pair for each of its boxes.

        Args:
            levels: the geometry of the levels.
            level_shapes: (height, width) in cells of each level.
            boxes: for each image (Mi, 4) as x0, y0, x1, y1 in pixels of the network input.

        Raises:
            ValueError: if a box is not finite.
        """
        raise NotImplementedError

    def __call__(
        self,
        levels: Levels,
        level_shapes: Sequence[tuple[int, int]],
        boxes: Sequence[Tensor],
        classes: Tensor | None = None,
        outputs: HeadOutputs | None = None,
    ) -> Positives:
        """Assign the boxes of a batch, on their device.

        Args:
            levels, level_shapes, boxes: see :meth:`candidates`.
            classes: (M,) int64 of all boxes. This and ``outputs`` are for rules that see them.
            outputs: what the head predicts for the batch.
        """
        candidates = self.candidates(levels, level_shapes, boxes)
        return lowest_cost_wins(candidates, level_shapes, len(boxes))


def boxes_of_batch(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The M boxes of all images: (M, 4) float32, and (M,) int64 image of each.

    Raises:
        ValueError: if a box is not finite.
    """
    all_boxes = torch.cat(list(boxes)).float()
    device = all_boxes.device
    boxes_per_image = torch.tensor([len(b) for b in boxes], device=device)
    image_of_box = torch.arange(len(boxes), device=device).repeat_interleave(boxes_per_image)
    bad = ~torch.isfinite(all_boxes).all(dim=1)
    if bad.any():
        raise ValueError(
            "Ground-truth boxes must be finite; not so in the image(s) number "
            f"{image_of_box[bad].unique().tolist()} of the batch: {all_boxes[bad].tolist()}"
        )
    return all_boxes, image_of_box
