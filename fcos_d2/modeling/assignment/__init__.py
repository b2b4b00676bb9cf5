"""Which location learns which box: what all rules share, and one rule a file.

A rule makes candidates, pairs of a location and a box. Who wins a location, and the targets, are
the same for all. "location" and "atss" see boxes alone and work on the host. "simota" and
"task_aligned" see what the head predicts at their candidates, and choose where it is.
"""

from ..validation import check_choice
from .assigner import Assigner
from .atss import ATSSAssigner
from .location import LocationAssigner
from .simota import SimOTAAssigner
from .task_aligned import TaskAlignedAssigner

# By MODEL.FCOS.ASSIGNMENT.
ASSIGNERS: dict[str, type[Assigner]] = {
    "location": LocationAssigner,
    "atss": ATSSAssigner,
    "simota": SimOTAAssigner,
    "task_aligned": TaskAlignedAssigner,
}


def build_assigner(cfg) -> Assigner:
    """The rule that ``MODEL.FCOS.ASSIGNMENT`` names.

    Raises:
        ValueError: for another name, and for SOLVER.ATSS_ITERS with another rule than theirs.
    """
    name = cfg.MODEL.FCOS.ASSIGNMENT
    check_choice("ASSIGNMENT", name, list(ASSIGNERS))
    if cfg.SOLVER.ATSS_ITERS and name != "task_aligned":
        raise ValueError(
            f"SOLVER.ATSS_ITERS {cfg.SOLVER.ATSS_ITERS} is for MODEL.FCOS.ASSIGNMENT "
            f"'task_aligned', and ASSIGNMENT is {name!r}: set ATSS_ITERS 0, or ASSIGNMENT "
            "'task_aligned'"
        )
    return ASSIGNERS[name](cfg)
