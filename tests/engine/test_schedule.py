"""What train_net.py makes of the length of a training."""

import logging
import os
import re
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils import comm

from fcos_d2 import model_zoo
from fcos_d2.config import get_cfg
from fcos_d2.engine import arguments, setup
from fcos_d2.engine.schedule import (
    AUTOMATIC,
    follow_cores,
    follow_epochs,
    scaled_to_processes,
    table,
    with_schedule,
)

COCO = model_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.yaml")
CONFIGS = sorted(Path(COCO).parents[1].rglob("*.yaml"))


@pytest.fixture
def solver(monkeypatch, tmp_path):
    """The section SOLVER of a run with these changes."""
    monkeypatch.setattr(arguments, "default_setup", lambda *args: None)  # takes seconds
    monkeypatch.setattr(arguments, "set_up_loggers", lambda *args: None)

    def _solver(*opts, config=COCO, **options):
        opts = [*opts, "OUTPUT_DIR", str(tmp_path)]
        return setup(SimpleNamespace(config_file=str(config), opts=opts, **options)).SOLVER

    return _solver


def schedule(solver):
    return solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS


@pytest.mark.parametrize(
    ("max_iter", "steps", "warmup"),
    [
        (300, (200, 266), 3),  # 300 / 90,000 of 60,000, 80,000 and 1,000
        (180_000, (120_000, 160_000), 2000),
        (2, (1,), 0),  # 1.33 and 1.78
        (1, (), 0),
        (90_000, (60_000, 80_000), 1000),
    ],
)
def test_steps_and_warmup_follow_the_length(solver, caplog, max_iter, steps, warmup):
    caplog.set_level(logging.INFO, logger="fcos_d2")
    assert schedule(solver("SOLVER.MAX_ITER", max_iter)) == (steps, max_iter, warmup)
    line = (
        f"SOLVER.MAX_ITER 90000 -> {max_iter} scales SOLVER.STEPS (60000, 80000) -> {steps}, "
        f"WARMUP_ITERS 1000 -> {warmup}"
    )
    said = {x for x in caplog.messages if "MAX_ITER" in x}
    assert said == (set() if max_iter == 90_000 else {line})


@pytest.fixture
def aligned(tmp_path):
    """COCO's schedule of 1x, 30,000 iterations of it by ATSS."""
    file = tmp_path / "aligned.yaml"
    file.write_text(f"_BASE_: {COCO}\nSOLVER: {{ATSS_ITERS: 30000}}\n")
    return file


def test_atss_iterations_follow_the_length(solver, aligned):
    assert solver(config=aligned).ATSS_ITERS == 30_000
    assert solver("SOLVER.MAX_ITER", 300, config=aligned).ATSS_ITERS == 100
    assert solver("SOLVER.MAX_ITER", 2, config=aligned).ATSS_ITERS == 0
    given = "SOLVER.MAX_ITER", 300, "SOLVER.ATSS_ITERS", 7
    assert solver(*given, config=aligned).ATSS_ITERS == 7
    for number in (300, 301, -1):
        message = f"ATSS_ITERS {number} must be from 0 to below .* 300"
        with pytest.raises(ValueError, match=message):
            solver("SOLVER.MAX_ITER", 300, "SOLVER.ATSS_ITERS", number, config=aligned)
    # 50 epochs of 160 images, 16 a batch, are 500 iterations.
    *_, text = epochs(50, 160, "SOLVER.ATSS_ITERS", 30_000, given=["SOLVER.EPOCHS"])
    assert re.search(r"SOLVER\.ATSS_ITERS +166 +0\.333 of the run", text)
    assert "ATSS" not in epochs(50, 160)[-1]


def test_atss_iterations_follow_the_processes():
    cfg = get_cfg()
    cfg.SOLVER.merge_from_list(["REFERENCE_WORLD_SIZE", 2, "MAX_ITER", 900, "ATSS_ITERS", 300])
    cfg.SOLVER.STEPS = ()
    cfg.freeze()
    assert scaled_to_processes(cfg, 2) is cfg
    scaled = scaled_to_processes(cfg, 6)  # three times as many images in a step
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.ATSS_ITERS) == (300, 100)


def test_what_is_given_stays(solver):
    given = ["SOLVER.MAX_ITER", 300, "SOLVER.STEPS", "(100, 250)", "SOLVER.WARMUP_ITERS", 50]
    assert schedule(solver(*given)) == ((100, 250), 300, 50)
    assert schedule(solver(*given[:4])) == ((100, 250), 300, 3)
    assert schedule(solver("SOLVER.WARMUP_ITERS", 50)) == ((60_000, 80_000), 90_000, 50)


def test_an_entry_that_the_command_line_completes(solver, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(
        f"_BASE_: {COCO}\nDATASETS: {{CUSTOM: {{half: {{FORMAT: voc, ROOT: a, SPLIT: b}}}}}}\n"
    )
    opts = ["DATASETS.CUSTOM.half.CLASSES", "[a]", "SOLVER.MAX_ITER", 300]
    assert schedule(solver(*opts, config=child)) == ((200, 266), 300, 3)


def test_an_evaluation_has_no_schedule(solver):
    own = (60_000, 80_000), 300, 1000
    assert schedule(solver("SOLVER.MAX_ITER", 300, eval_only=True)) == own


def test_data_of_your_own_with_a_coco_config(solver, shapes_folder):
    data = str(shapes_folder / "shapes")
    found = solver("SOLVER.MAX_ITER", 300, data=data)
    assert schedule(found) == ((200, 266), 300, 3)
    assert found.EPOCHS == 0
    assert solver(data=data).EPOCHS == AUTOMATIC
    assert schedule(solver("SOLVER.EPOCHS", 0, data=data)) == ((60_000, 80_000), 90_000, 1000)
    assert solver(data=data, epochs=3).EPOCHS == 3
    assert solver(data=data).EMA.DECAY == AUTOMATIC
    assert solver("SOLVER.EMA.DECAY", 0.0, data=data).EMA.DECAY == 0.0  # given
    assert solver("TEST.PRECISE_BN.ENABLED", True, data=data).EMA.DECAY == 0.0
    assert solver(epochs=3).EMA.DECAY == 0.0  # not without --data


def test_the_rate_follows_the_batch(solver, caplog):
    caplog.set_level(logging.INFO, logger="fcos_d2")
    found = solver("SOLVER.REFERENCE_WORLD_SIZE", 8, batch=4)
    # 0.01 is for 16 images.
    assert (found.IMS_PER_BATCH, found.BASE_LR) == (4, 0.0025)
    assert found.REFERENCE_WORLD_SIZE == 0  # else the trainer would scale once more
    assert "SOLVER.IMS_PER_BATCH 16 -> 4 scales SOLVER.BASE_LR 0.01 -> 0.0025" in caplog.messages
    assert solver("SOLVER.IMS_PER_BATCH", 4, epochs=2).BASE_LR == 0.0025
    assert solver("SOLVER.IMS_PER_BATCH", 4).BASE_LR == 0.01  # as in Detectron2
    assert solver("SOLVER.BASE_LR", 0.5, batch=4).BASE_LR == 0.5


@pytest.mark.parametrize(
    ("options", "opts", "message"),
    [
        ({"epochs": 0}, (), r"--epochs must be at least 1, .* got 0"),
        ({"epochs": -1}, (), "got -1"),
        ({"epochs": 5}, ("SOLVER.MAX_ITER", 300), "give one of them"),
        ({"epochs": 5}, ("SOLVER.EPOCHS", 6), r"not be given beside SOLVER\.EPOCHS"),
        ({"batch": 0}, (), "--batch must be at least 1"),
        ({"batch": 4}, ("SOLVER.IMS_PER_BATCH", 8), "not be given beside"),
    ],
)
def test_options_that_cannot_be(solver, options, opts, message):
    with pytest.raises(ValueError, match=message):
        solver(*opts, **options)


def epochs(number, images, *opts, given=()):
    """The derived keys, with COCO's schedule of 1x."""
    cfg = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["SOLVER.EPOCHS", number, *opts])
    rows = follow_epochs(cfg, images, given or opts[::2])
    periods = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    assert all(attrgetter(key)(cfg) == value for key, value, _ in rows)
    return *schedule(cfg.SOLVER), *periods, table(rows)


def test_the_schedule_follows_the_epochs():
    # 50 epochs of 160 images in batches of 16 are 500 iterations; 2/3 and 8/9 of them are 333 and
    # 444. 10 iterations are an epoch, and 25 epochs are evaluated together.
    *found, text = epochs(50, 160)
    assert found == [(333, 444), 500, 50, 250, 250]
    assert "50 epochs of 160 images, 16 a batch" in text
    assert "after 0.667, 0.889 of the run" in text
    # 3125 iterations an epoch: each is evaluated, and the warm-up is the config's own.
    assert epochs(4, 50_000)[:-1] == ((8333, 11111), 12500, 1000, 3125, 3125)
    # One image and a tiny run.
    assert epochs(1, 1)[:-1] == ((), 1, 0, 250, 250)
    *found, text = epochs(50, 160, "SOLVER.STEPS", (100,), "TEST.EVAL_PERIOD", 7)
    assert found == [(100,), 500, 50, 250, 7]
    assert re.search(r"SOLVER\.STEPS +\(100,\) +given", text)


@pytest.mark.parametrize(
    ("images", "iterations"),
    [
        (160, 2000),  # 50 epochs are 500
        (6400, 20_000),
        (50_000, 90_000),  # 50 epochs are 156,250, but the config has 90,000
    ],
)
def test_the_number_of_epochs_follows_the_data(images, iterations):
    found = epochs(AUTOMATIC, images)
    assert found[1] == iterations
    assert f"{iterations * 16 / images:.3g} epochs of {images} images" in found[-1]


@pytest.mark.parametrize(("iterations", "decay"), [(1999, 0.0), (2000, 0.995), (90_000, 0.999889)])
def test_the_average_follows_the_length(caplog, iterations, decay):
    """It moves by 10 / MAX_ITER in each step, so that it is over a tenth of the run."""
    caplog.set_level(logging.INFO, logger="fcos_d2")
    cfg = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["SOLVER.EMA.DECAY", -1.0, "SOLVER.MAX_ITER", iterations])
    found = with_schedule(cfg, [], given=()).SOLVER.EMA["DECAY"]
    assert found == pytest.approx(decay, abs=1e-9)
    assert re.search(rf"SOLVER\.EMA\.DECAY +{found} ", caplog.text)
    assert ("no average" in caplog.text) == (decay == 0)


def test_numbers_of_epochs_that_cannot_be():
    with pytest.raises(ValueError, match=r"EPOCHS must be .* got -2"):
        epochs(-2, 160)
    with pytest.raises(ValueError, match=r"EPOCHS 1000000000 makes .* choose a smaller"):
        epochs(10**9, 160)


def test_as_many_workers_as_cores(solver, monkeypatch):
    cfg = get_cfg()
    for cores, own, processes, expected in [
        (16, 4, 1, 4), (2, 4, 1, 2), (8, 4, 4, 2), (4, 4, 8, 1), (2, 0, 1, 0),
    ]:  # fmt: skip
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        monkeypatch.setattr(comm, "get_local_size", lambda n=processes: n)
        cfg.DATALOADER.NUM_WORKERS = own
        said = follow_cores(cfg, given=[])
        assert expected == cfg.DATALOADER.NUM_WORKERS
        change = f"DATALOADER.NUM_WORKERS {own} -> {expected} in each process: {cores} cores for"
        assert said.startswith(change) if own != expected else said == ""
    cfg.DATALOADER.NUM_WORKERS = 9
    assert follow_cores(cfg, given=["DATALOADER.NUM_WORKERS"]) == ""
    assert cfg.DATALOADER.NUM_WORKERS == 9


@pytest.mark.parametrize("steps", ["(200, 300)", "(400,)", "(200, 100)", "(100, 100)", "(0, 100)"])
def test_steps_beyond_the_end_are_refused(solver, tmp_path, steps):
    message = r'MAX_ITER 300: .*write SOLVER\.STEPS "\(200, 266\)", or "\(\)"'
    with pytest.raises(ValueError, match=message):
        solver("SOLVER.MAX_ITER", 300, "SOLVER.STEPS", steps)
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {COCO}\nSOLVER:\n  MAX_ITER: 300\n  STEPS: '{steps}'\n")
    with pytest.raises(ValueError, match=message):
        solver(config=child)
    cosine = solver("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", config=child)
    assert cosine.MAX_ITER == 300


def test_all_configs_have_steps_before_their_end(solver):
    assert len(CONFIGS) > 40
    for config in CONFIGS:
        solver(config=config)
