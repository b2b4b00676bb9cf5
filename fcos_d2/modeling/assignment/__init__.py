"""Which location learns which box: what all rules share, and one rule a file.

A rule makes candidates, pairs of a location and a box with a cost. Who wins a location, and the
targets, are the same for all. The rules here see boxes alone and work on the host; a rule that sees
what the head predicts would gather it at its candidates, and differ in no more than that.
"""

from ..validation import check_choice
from .assigner import Assigner
from .atss import ATSSAssigner
from .location import LocationAssigner

# By MODEL.FCOS.ASSIGNMENT.
ASSIGNERS: dict[str, type[Assigner]] = {"location": LocationAssigner, "atss": ATSSAssigner}


def build_assigner(cfg) -> Assigner:
    """The rule that ``MODEL.FCOS.ASSIGNMENT`` names; a ValueError for another name."""
    check_choice("ASSIGNMENT", cfg.MODEL.FCOS.ASSIGNMENT, list(ASSIGNERS))
    return ASSIGNERS[cfg.MODEL.FCOS.ASSIGNMENT](cfg)
