from .arguments import argument_parser, setup
from .eval_only import evaluate
from .evaluators import coco_evaluator
from .hooks import BestCheckpointer
from .loggers import log_results
from .processes import distribute, launch, leave_group
from .resuming import delete_earlier_run
from .stopping import Stopped
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "Stopped",
    "Trainer",
    "argument_parser",
    "coco_evaluator",
    "delete_earlier_run",
    "distribute",
    "evaluate",
    "launch",
    "leave_group",
    "log_results",
    "setup",
]
