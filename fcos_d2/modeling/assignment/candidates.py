"""Which location learns which box: boxes -> candidates -> positives -> targets.

Shapes: C candidates, P positives, K classes, N images, (Hi, Wi) cells of level i.

Candidate: a location and a box that it may learn. A rule of assignment says which there are.
Positive: a candidate that won its location, the one with the lowest cost. All other locations are
background.
Target: what a positive learns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor

from ...runtime import to_device
from ..head import HeadOutputs
from ..points import Levels


@dataclass(frozen=True)
class Candidates:
    """Pairs of a location and a box that it may learn, level by level.

    Attributes:
        image: (C,) int64 index of the image in the batch.
        level: (C,) int64 index of the level; 0 is the finest.
        x, y: (C,) int64 column and row of the cell on its level.
        gt: (C,) int64 index of the box, into the boxes of all images concatenated.
        ltrb: (C, 4) float32 distances from the location to the sides of the box, in pixels.
        cost: (C,) float32, finite. Of several boxes a location learns the one with the lowest.
    """

    image: Tensor
    level: Tensor
    x: Tensor
    y: Tensor
    gt: Tensor
    ltrb: Tensor
    cost: Tensor

    def __len__(self) -> int:
        return len(self.gt)

    def __getitem__(self, mask: Tensor) -> "Candidates":
        """The candidates that a (C,) bool mask selects."""
        chosen = mask.nonzero()[:, 0]
        return Candidates(*(field.index_select(0, chosen) for field in vars(self).values()))


@dataclass(frozen=True)
class Positives(Candidates):
    """The candidates that won their location: no cell of an image appears twice.

    Attributes:
        score: (P,) float32 in [0, 1], what the score of the class is to be.
    """

    score: Tensor


@dataclass(frozen=True)
class Targets:
    """Where the positives of a batch are and what they learn, level by level.

    Attributes:
        image, x, y: (P,) int64 image, column and row of each positive.
        classes: (P,) int64 in [0, K).
        ltrb: (P, 4) float32 distances in pixels, all > 0.
        scores: (P,) float32 in [0, 1], what the score of the class is to be; 1 in FCOS.
        per_level: number of positives on each level, a list: reading it waits for no GPU.
        are_aligned: whether the scores say how well class and box go together, as ASSIGNMENT
            "task_aligned" does. Then QUALITY "joint" does not multiply them by the IoU.
    """

    image: Tensor
    x: Tensor
    y: Tensor
    classes: Tensor
    ltrb: Tensor
    scores: Tensor
    per_level: list[int]
    are_aligned: bool = False

    def __len__(self) -> int:
        return len(self.classes)

    def by_level(self) -> Iterator[tuple[Tensor, ...]]:
        """(image, y, x, classes) of the positives on each level."""
        fields = (self.image, self.y, self.x, self.classes)
        return zip(*(field.split(self.per_level) for field in fields), strict=True)

    def to(self, device: torch.device) -> "Targets":
        tensors = (self.image, self.x, self.y, self.classes, self.ltrb, self.scores)
        on_device = (to_device(x, device) for x in tensors)
        return Targets(*on_device, self.per_level, self.are_aligned)


def gather(maps: Sequence[Tensor], targets: Targets) -> Tensor:
    """(P, C) entries of the (N, C, Hi, Wi) maps at the positives."""
    by_level = zip(maps, targets.by_level(), strict=True)
    return torch.cat([level_map[image, :, y, x] for level_map, (image, y, x, _) in by_level])


@torch.no_grad()
def lowest_cost_wins(
    candidates: Candidates, level_shapes: Sequence[tuple[int, int]], num_images: int
) -> Positives:
    """The positives: for each location, its pair with the lowest cost.

    Of equal costs the first box wins.
    """
    cell = cell_numbers(candidates, level_shapes, num_images)
    num_cells = num_images * sum(height * width for height, width in level_shapes)
    winners = candidates[wins_cell(candidates.cost, candidates.gt, cell, num_cells)]
    return Positives(**vars(winners), score=torch.ones_like(winners.cost))


def wins_cell(cost: Tensor, gt: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """(C,) bool, whether each candidate has the lowest cost of its cell. Waits for no GPU.

    Of equal costs the first box wins.
    """
    # Cost and box number make one exact key.
    key = (in_order_of(cost) << 32) | gt
    lowest = torch.full((num_cells,), torch.iinfo(torch.int64).max, device=cell.device)
    lowest.scatter_reduce_(0, cell, key, reduce="amin")
    return lowest[cell] == key


def in_order_of(values: Tensor) -> Tensor:
    """(C,) int64 in [-2^31, 2^31) in the order of float32 numbers."""
    # As integers, the bits of non-negative float32 numbers have the order of the numbers, and those
    # of negative ones the opposite order.
    bits = values.view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def cell_numbers(
    candidates: Candidates, level_shapes: Sequence[tuple[int, int]], num_images: int
) -> Tensor:
    """(C,) int64 number of each candidate's cell among those of all levels and images."""
    device, level = candidates.x.device, candidates.level
    height, width = torch.tensor(level_shapes, device=device).unbind(dim=1)
    size = height * width
    level_begin = num_images * (size.cumsum(0) - size)
    begin, size, width = (x.index_select(0, level) for x in (level_begin, size, width))
    return begin + candidates.image * size + candidates.y * width + candidates.x


def make_targets(
    assigner: Callable[..., Positives],
    levels: Levels,
    level_shapes: Sequence[tuple[int, int]],
    instances: Sequence[Instances],
    outputs: HeadOutputs | None = None,
) -> Targets:
    """The targets of a batch, on the device of its instances.

    Args:
        assigner: of levels, level_shapes, the boxes and classes of each image, and the outputs; see
            Assigner.
        instances: of each image, with ``gt_boxes`` and ``gt_classes``.
        outputs: of the head, for rules that see them.
    """
    boxes = [x.gt_boxes.tensor for x in instances]
    classes = torch.cat([x.gt_classes for x in instances])
    positives = assigner(levels, level_shapes, boxes, classes, outputs)
    are_aligned = getattr(assigner, "makes_alignments", False)
    return targets_of(positives, classes, positives.score, len(levels), are_aligned)


def targets_of(
    pairs: Candidates, classes: Tensor, scores: Tensor, num_levels: int, are_aligned: bool = False
) -> Targets:
    """What locations learn of the boxes beside them, whose classes are listed box by box."""
    return Targets(
        image=pairs.image,
        x=pairs.x,
        y=pairs.y,
        classes=classes[pairs.gt],
        ltrb=pairs.ltrb,
        scores=scores,
        per_level=torch.bincount(pairs.level, minlength=num_levels).tolist(),
        are_aligned=are_aligned,
    )


def check_classes(instances: Sequence[Instances], num_classes: int) -> None:
    """Raise a ValueError for class numbers outside [0, num_classes)."""
    for i, x in enumerate(instances):
        classes = x.gt_classes.tolist()
        lowest, highest = min(classes, default=0), max(classes, default=0)
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"Image number {i} of the batch has classes from {lowest} to {highest}, but the "
                f"model has {num_classes}: classes are numbered from 0"
            )
