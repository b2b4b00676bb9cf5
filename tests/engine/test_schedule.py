"""What train_net.py makes of the length of a training."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from fcos_d2 import model_zoo
from fcos_d2.engine import arguments, setup

COCO = model_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.yaml")
CONFIGS = sorted(Path(COCO).parents[1].rglob("*.yaml"))


@pytest.fixture
def solver(monkeypatch, tmp_path):
    """The section SOLVER of a run with these changes."""
    monkeypatch.setattr(arguments, "default_setup", lambda *args: None)  # takes seconds
    monkeypatch.setattr(arguments, "setup_logger", lambda *args, **kwargs: None)

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
    logging.getLogger("fcos_d2").propagate = True
    caplog.set_level(logging.INFO, logger="fcos_d2")
    assert schedule(solver("SOLVER.MAX_ITER", max_iter)) == (steps, max_iter, warmup)
    line = (
        f"SOLVER.MAX_ITER 90000 -> {max_iter} scales SOLVER.STEPS (60000, 80000) -> {steps}, "
        f"WARMUP_ITERS 1000 -> {warmup}"
    )
    said = {x for x in caplog.messages if "MAX_ITER" in x}
    assert said == (set() if max_iter == 90_000 else {line})


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
    assert schedule(solver("SOLVER.MAX_ITER", 300, data=data)) == ((200, 266), 300, 3)


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
