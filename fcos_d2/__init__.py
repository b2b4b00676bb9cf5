"""FCOS (arXiv 1904.01355, 2006.09214) as a Detectron2 extension.

Importing this package registers the meta architecture ``"FCOS"`` and the backbone builders
``"build_fcos_resnet_fpn_backbone"``, ``"build_fcos_resnet_bifpn_backbone"``,
``"build_fcos_timm_fpn_backbone"`` and ``"build_fcos_timm_hrfpn_backbone"`` with Detectron2.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

__all__ = ["Predictor", "add_fcos_config", "get_cfg", "load_cfg", "model_zoo"]

_detectron2 = find_spec("detectron2")
if _detectron2 is None or _detectron2.origin is None:  # no origin: a folder, not a package
    _requirement = (Path(__file__).parent / "detectron2.txt").read_text().strip()
    raise ImportError(
        "fcos_d2 needs Detectron2, which is not installed in this Python "
        f"({sys.executable}). Install it with\n"
        f"    pip install --no-build-isolation '{_requirement}'\n"
        "(after torch and 'setuptools<81'), or run `make setup` in a clone of fcos_d2. "
        "There, `python tools/doctor.py` checks the whole installation."
    )
else:
    with warnings.catch_warnings():
        # Detectron2 and fvcore script functions when they are imported.
        warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
        import detectron2  # noqa: F401  first: it may call d2_env, which needs all of this package

        from . import (  # noqa: F401  registration only
            checkpoint,
            model_zoo,
            modeling,
        )
        from .config import add_fcos_config, get_cfg, load_cfg
        from .inference import Predictor
