"""What a run writes to the screen, and what to log.txt."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUP = """
import logging, sys
from fcos_d2.engine import argument_parser, setup
args = ["--config-file", "quick_schedules/fcos_R_18_FPN_shapes.yaml", "OUTPUT_DIR", sys.argv[1]]
for _ in range(2):
    setup(argument_parser("").parse_args(args))
logger = logging.getLogger("fcos_d2.test")
logger.info("\\n".join(map(str, range(30))))
logger.info("\\n".join(map(str, range(100, 200))))
"""


def run(tmp_path, folder):
    done = subprocess.run(
        [sys.executable, "-c", SETUP, folder],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "torch.jit" not in done.stderr
    return done.stdout


def test_long_messages_are_cut_on_the_screen_alone(tmp_path):
    screen = run(tmp_path, str(tmp_path / "output")).splitlines()
    log = (tmp_path / "output" / "log.txt").read_text().splitlines()
    assert len(log) > 600 and len(screen) < 70
    assert "  (99 more lines are in log.txt)" in screen
    assert "29" in screen and "100" not in screen and "199" in log
    # Once each, although it was set up twice: no second handler.
    assert sum(line.endswith("]: 0") for line in screen) == 1
    assert screen.count("  (99 more lines are in log.txt)") == 1
