"""Runs Detectron2's own tools, unchanged, on the configs of fcos_d2::

    export DETECTRON2_ENV_MODULE=fcos_d2.d2_env FCOS_D2_CONFIG=configs/....yaml
    python tools/train_net.py --config-file $FCOS_D2_CONFIG ...

When Detectron2 is imported, it imports the module that the first variable names, and calls its
``setup_environment``. Importing fcos_d2 alone changes nothing. See docs/ecosystem.md.
"""

import os

from detectron2.config import defaults

from .config import get_cfg, load_cfg


def setup_environment() -> None:
    """Make Detectron2's tools take the configs of fcos_d2. Detectron2 calls this, once.

    - Adds the keys of fcos_d2 to its default config; ``MODEL.DEVICE`` becomes "cpu" without a GPU.
    - Registers the data sets in ``DATASETS.CUSTOM`` of the config that FCOS_D2_CONFIG names.

    Raises:
        ValueError: if it cannot read that config; see :func:`fcos_d2.load_cfg`.
    """
    # The default config itself: Detectron2 has no public way to add a key for the tools, which
    # import its get_cfg by name.
    defaults._C.update(get_cfg())
    config_file = os.environ.get("FCOS_D2_CONFIG")
    if config_file:
        load_cfg(config_file)  # registers them
