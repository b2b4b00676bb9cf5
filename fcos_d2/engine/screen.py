"""What a run writes to the screen; log.txt in OUTPUT_DIR has all of it."""

import logging
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

# Of one message; the table of COCO's 80 classes has 30. Those about the environment and the config,
# which default_setup writes under this name, are of use in the file.
_MOST_LINES, _OF_SETUP = 40, "detectron2"


class _Shortened(logging.Formatter):
    """The first line alone of what is longer than a screen, such as the config and the model."""

    def __init__(self, whole: logging.Formatter):
        super().__init__()
        self.whole = whole

    def format(self, record: logging.LogRecord) -> str:
        most = 5 if record.name == _OF_SETUP else _MOST_LINES
        text = self.whole.format(record)
        first, *others = text.splitlines() or [text]
        if len(others) < most:
            return text
        return f"{first}\n  ({len(others)} more lines are in log.txt)"


def set_up_loggers(output_dir: str) -> None:
    """Set up the loggers of Detectron2, fvcore and this package, with long messages cut short.

    Args:
        output_dir: the folder of log.txt; "" for none, and then nothing is cut.
    """
    # With the arguments of Detectron2's default_setup, which then finds its loggers set up.
    loggers = [
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name="fvcore"),
        setup_logger(output_dir, distributed_rank=comm.get_rank()),
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name="fcos_d2"),
    ]
    for handler in [h for logger in loggers for h in logger.handlers]:
        on_screen = getattr(handler, "stream", None) is sys.stdout
        if output_dir and on_screen and not isinstance(handler.formatter, _Shortened):
            handler.setFormatter(_Shortened(handler.formatter))
