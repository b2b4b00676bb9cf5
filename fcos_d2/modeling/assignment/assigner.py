"""What every rule of assignment that sees boxes alone offers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..points import Levels
from .candidates import Candidates, Positives, lowest_cost_wins


class Assigner:
    """A rule that sees boxes alone, on the device of the boxes."""

    def check_levels(self, levels: Sequence) -> None:
        """Raise a ValueError if the rule is not made for that many levels."""

    @property
    def settings(self) -> dict:
        """What the assignment depends on besides the geometry of the levels, ready for JSON."""
        return {}

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
        self, levels: Levels, level_shapes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> Positives:
        """Assign the boxes of a batch; see :meth:`candidates`."""
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
