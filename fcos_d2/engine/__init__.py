from .evaluation import evaluate
from .evaluators import coco_evaluator
from .hooks import BestCheckpointer
from .processes import argument_parser, launch
from .resuming import delete_earlier_run
from .stopping import Stopped
from .trainer import Trainer, distribute, setup

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
    "setup",
]
