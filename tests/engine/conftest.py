import pytest
from helpers import LIGHT, tiny_cfg

from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer


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


@pytest.fixture
def evaluated_models(cfg, monkeypatch):
    """The kinds of the models that a run with test-time augmentation evaluates, as it goes on."""
    models = []

    def record(cls, cfg, model, evaluators=None):
        models.append(type(model).__name__)
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(record))
    cfg.TEST.AUG.ENABLED = True
    return models
