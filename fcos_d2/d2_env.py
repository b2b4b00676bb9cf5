"""Detectron2's own tools on the configs of fcos_d2, without a change to them::

    DETECTRON2_ENV_MODULE=fcos_d2.d2_env python tools/train_net.py --config-file ...

Detectron2, when it is imported, imports the module that this variable names, and calls its
``setup_environment``. Importing fcos_d2 does nothing of this. See docs/ecosystem.md.
"""

import sys
from contextlib import suppress
from functools import wraps
from pathlib import Path

import torch
from detectron2.config import CfgNode, defaults
from detectron2.data import DatasetCatalog

from .config import add_fcos_config, drop_keys_of_other_formats, load_cfg, merge_yaml_values
from .data import register_custom_datasets


def setup_environment() -> None:
    """Make Detectron2's tools take the configs of fcos_d2. Detectron2 calls this, once.

    - Its default config has the keys of fcos_d2, and ``MODEL.DEVICE`` is "cpu" without a GPU.
    - Configs are read as by :func:`fcos_d2.config.load_cfg`, both files and command lines.
    - The data sets of ``DATASETS.CUSTOM`` are registered when a file has been read, and again when
      the config is frozen, which is the last thing that a tool does to it. Then demo.py's threshold
      reaches FCOS, too.
    - A data set that is not registered is looked for in the config of the run whose results, a
      JSON, are on the command line: visualize_json_results.py takes no config.

    Configs without the keys of fcos_d2 behave as before.
    """
    # Not another get_cfg: the tools and Detectron2's model zoo import that one by its name.
    add_fcos_config(defaults._C)
    if not torch.cuda.is_available():
        defaults._C.MODEL.DEVICE = "cpu"
    # Not a subclass of CfgNode: a merge refuses a tree that has nodes of two types, and other
    # packages add theirs (export_model.py, those of PointRend).
    CfgNode.merge_from_file = _merge_from_file(CfgNode.merge_from_file)
    CfgNode.merge_from_list = _merge_from_list(CfgNode.merge_from_list)
    CfgNode.freeze = _freeze(CfgNode.freeze)
    # UserDict calls this for a key that it lacks.
    type(DatasetCatalog).__missing__ = _find_in_run


def _is_ours(cfg: CfgNode) -> bool:
    """Whether this is a whole config with our keys: not another tree, and not a part of one."""
    places = {"MODEL": "FCOS", "DATASETS": "CUSTOM"}
    return all(isinstance(cfg.get(p), CfgNode) and key in cfg[p] for p, key in places.items())


def _merge_from_file(merge):
    @wraps(merge)
    def merge_from_file(self: CfgNode, cfg_filename: str, allow_unsafe: bool = True) -> None:
        merge(self, cfg_filename, allow_unsafe)
        if _is_ours(self):
            drop_keys_of_other_formats(self, cfg_filename)
            # For SAHI, which freezes nothing. What a command line has yet to complete can wait.
            with suppress(ValueError):
                register_custom_datasets(self)

    return merge_from_file


def _merge_from_list(merge):
    @wraps(merge)
    def merge_from_list(self: CfgNode, cfg_list: list) -> None:
        merge(self, merge_yaml_values(self, cfg_list) if _is_ours(self) else cfg_list)

    return merge_from_list


def _freeze(freeze):
    @wraps(freeze)
    def freeze_and_register(self: CfgNode) -> None:
        if _is_ours(self) and not self.is_frozen():
            _take_threshold_of_demo(self)
            register_custom_datasets(self)
        freeze(self)

    return freeze_and_register


def _take_threshold_of_demo(cfg: CfgNode) -> None:
    """Give FCOS the ``--confidence-threshold`` of demo.py: the least score that is shown.

    demo.py writes it, after all else, to the three keys of Detectron2's own models. They are known
    by being equal, which their defaults are not.
    """
    model = cfg.MODEL
    threshold = model.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH
    others = (model.RETINANET.SCORE_THRESH_TEST, model.ROI_HEADS.SCORE_THRESH_TEST)
    if model.META_ARCHITECTURE == "FCOS" and others == (threshold, threshold):
        model.FCOS.SCORE_THRESH_TEST, model.FCOS.SCORE_THRESH_ON = threshold, "score"


def _find_in_run(catalog, name: str):
    """Register a data set of ``OUTPUT_DIR/config.yaml``, for results in ``OUTPUT_DIR/inference``.

    Raises:
        KeyError: if no run on the command line has it.
    """
    for argument in sys.argv[1:]:
        results = Path(argument.rpartition("=")[2])
        # Some tools put a folder with the name of the data set between the two.
        for folder in results.absolute().parents[1:3] if results.suffix == ".json" else ():
            config = folder / "config.yaml"
            cfg = load_cfg(str(config)) if config.is_file() else None
            if cfg is not None and name in cfg.DATASETS.CUSTOM:
                register_custom_datasets(cfg)
                return catalog.data[name]
    raise KeyError(name)
