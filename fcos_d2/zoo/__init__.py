"""The published checkpoints of FCOS by name: ``adelaidet://FCOS_MS_R_50_2x`` and the like."""

from . import weights  # noqa: F401  registers the names with Detectron2's PathManager
from .published import DEFAULT, PUBLISHED, Published, check_fits, find

__all__ = ["DEFAULT", "PUBLISHED", "Published", "check_fits", "find"]
