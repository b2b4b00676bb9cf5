import pytest
from helpers import LIGHT, tiny_cfg

from fcos_d2.data import register_custom_datasets


@pytest.fixture
def cfg(shapes_folder, tmp_path, monkeypatch):
    """A run of six iterations that takes seconds, with a checkpoint after every second one."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg(LOSS_NORMALIZER="ema_fg")
    cfg.merge_from_list(LIGHT)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.STEPS = (3,)
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SOLVER.WARMUP_ITERS = 0
    register_custom_datasets(cfg)
    return cfg
