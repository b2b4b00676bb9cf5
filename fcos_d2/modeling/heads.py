"""The heads by name."""

from collections.abc import Sequence

from detectron2.layers import ShapeSpec

from .head import FCOSHead
from .points import Levels
from .task_aligned_head import TaskAlignedHead
from .validation import check_choice, check_same

Head = FCOSHead | TaskAlignedHead
# By MODEL.FCOS.HEAD.
HEADS: dict[str, type[Head]] = {"fcos": FCOSHead, "task_aligned": TaskAlignedHead}


def build_head(cfg, input_shape: Sequence[ShapeSpec], **arguments) -> Head:
    """The head that ``MODEL.FCOS.HEAD`` names.

    Args:
        input_shape: stride and channels of each level, finest first.
        arguments: of the head, in place of what the config says.

    Raises:
        ValueError: for another name, and as the head.
    """
    check_choice("HEAD", cfg.MODEL.FCOS.HEAD, list(HEADS))
    return HEADS[cfg.MODEL.FCOS.HEAD](cfg, input_shape, **arguments)


def check_locations(head: Head, levels: Levels) -> None:
    """Raise a ValueError for a head that takes other places for the locations of the cells."""
    if isinstance(head, TaskAlignedHead):
        offsets = {"head": head.levels.offset, "detector": levels.offset}
        check_same("location_offset", offsets)
