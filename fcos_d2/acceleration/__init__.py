"""How a detector runs, as opposed to what it is: nothing here changes a result beyond rounding."""

from .execution import Execution
from .norm_folding import fold_norms

__all__ = ["Execution", "fold_norms"]
