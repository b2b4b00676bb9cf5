"""FCOS (arXiv 1904.01355, 2006.09214) as a Detectron2 extension.

Importing this package registers the meta architecture ``"FCOS"`` and the backbone builder
``"build_fcos_resnet_fpn_backbone"`` with Detectron2.
"""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"

_running_doctor = "fcos_d2.doctor" in sys.orig_argv

_detectron2 = find_spec("detectron2")
if _detectron2 is None or _detectron2.origin is None:  # no origin: a folder, not a package
    if not _running_doctor:  # the doctor must be able to say that Detectron2 is missing
        raise ImportError(
            "fcos_d2 needs Detectron2, which is not installed in this Python "
            f"({sys.executable}). Install it with\n"
            "    pip install --no-build-isolation 'detectron2 @ "
            "git+https://github.com/facebookresearch/detectron2.git"
            "@02b5c4e295e990042a714712c21dc79b731e8833'\n"
            "(after torch and 'setuptools<81'), or run `make setup` in a clone of fcos_d2. "
            "`python -m fcos_d2.doctor` checks the whole installation."
        )
elif not _running_doctor:
    from . import (  # noqa: F401  registration only
        checkpoint,
        model_zoo,
        modeling,
    )
    from .config import add_fcos_config, get_cfg  # noqa: F401
    from .predictor import Predictor  # noqa: F401
