"""Several processes that fail, are killed, and stop, by every launcher. No training."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import free_port

WORKER = Path(__file__).with_name("peers_worker.py")
# A process that waits for another one would wait for the 5 minutes of the timeout.
SOON = 100  # seconds, of a machine that is busy

pytestmark = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 3, reason="three processes need three GPUs (NCCL), or none"
)


class Processes:
    """Three processes, as srun or torchrun start them, or of --num-gpus."""

    def __init__(self, case, folder, launcher="srun", **env):
        command = [sys.executable, str(WORKER), case, str(folder)]
        path = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
        outer = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        env = outer | {"PYTHONPATH": path} | env
        port = free_port()
        if launcher == "srun":
            place = {"SLURM_NTASKS": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started = [
                (command, place | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "012"
            ]
        elif launcher == "torchrun":
            run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
            started = [([*run, f"--master-port={port}", *command[1:]], {})]
        else:
            started = [([*command, "--num-gpus", "3"], {})]
        self.folder, self.screen = folder, folder / "screen.txt"
        with self.screen.open("w") as screen:
            self.running = [
                subprocess.Popen(c, env=env | place, stdout=screen, stderr=screen, cwd=folder)
                for c, place in started
            ]

    def wait_for(self, *names):
        end = time.monotonic() + 100
        while not all((self.folder / name).exists() for name in names):
            have_ended = all(process.poll() is not None for process in self.running)
            if have_ended or time.monotonic() > end:
                for process in self.running:
                    process.kill()
                pytest.fail(self.screen.read_text())
            time.sleep(0.05)

    def finish(self, timeout):
        """The exit codes."""
        try:
            return [process.wait(timeout) for process in self.running]
        finally:
            for process in self.running:
                process.kill()

    def kill(self, number, ranks=(0, 1, 2)):
        for rank in ranks:
            os.kill(int((self.folder / f"pid_{rank}").read_text()), number)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "--num-gpus"])
def test_a_process_that_fails_ends_the_others_with_its_error_last(tmp_path, launcher):
    processes = Processes("fail", tmp_path, launcher)
    if launcher == "srun":  # nobody else ends them
        processes.running[1].wait(100)
        assert processes.finish(timeout=SOON) == [1, 1, 1]
    else:
        assert processes.finish(timeout=100) == [1]
    screen = processes.screen.read_text()
    assert "ValueError: of process 1" in screen
    assert "closed by peer" not in screen
    if launcher == "torchrun":  # says more afterwards
        assert re.search(r"Root Cause.*rank +: 1 .*ValueError: of process 1", screen, re.DOTALL)
    else:
        assert screen.rstrip().endswith("ValueError: of process 1")


def test_a_process_that_fails_in_its_last_step(tmp_path, shapes_folder):
    datasets = {"DETECTRON2_DATASETS": str(shapes_folder)}
    processes = Processes("fail_in_the_last_step", tmp_path, **datasets)
    processes.running[1].wait(100)
    assert processes.finish(timeout=SOON) == [1, 1, 1]
    assert "ValueError: of process 1" in processes.screen.read_text()
    assert "Start inference" not in processes.screen.read_text()


def test_an_error_of_all_is_said(tmp_path):
    processes = Processes("fail_together", tmp_path)
    assert processes.finish(timeout=100) == [1, 1, 1]
    assert "ValueError: of process" in processes.screen.read_text()


def test_a_killed_process_ends_the_others(tmp_path):
    processes = Processes("killed", tmp_path)
    processes.running[1].wait(100)
    codes = processes.finish(timeout=SOON)
    assert codes == [1, -signal.SIGKILL, 1]
    assert "Process 1 has ended without an error of its own: it was killed" in (
        processes.screen.read_text()
    )


def test_agreement_comes_one_call_later(tmp_path):
    assert Processes("agree", tmp_path).finish(timeout=100) == [0, 0, 0]


def test_processes_leave_without_the_one_that_has_more_to_do(tmp_path):
    processes = Processes("leave", tmp_path)
    try:
        assert [process.wait(100) for process in processes.running[1:]] == [0, 0]
        assert processes.running[0].poll() is None
    finally:
        (tmp_path / "others_have_ended").touch()
        codes = processes.finish(timeout=SOON)
    assert codes == [0, 0, 0], processes.screen.read_text()


@pytest.mark.parametrize("ranks", [(0, 1, 2), (0,), (2,)])
def test_a_signal_ends_an_evaluation_of_all(tmp_path, ranks):
    processes = Processes("evaluate", tmp_path, ALONE="0.1")
    processes.wait_for("pid_0", "pid_1", "pid_2", "finished")
    processes.kill(signal.SIGTERM, ranks)
    assert processes.finish(timeout=SOON) == [143, 143, 143], processes.screen.read_text()


def test_a_signal_ends_what_one_process_evaluates_alone(tmp_path):
    processes = Processes("evaluate", tmp_path, ALONE="100")
    processes.wait_for("alone")
    processes.kill(signal.SIGINT)
    assert processes.finish(timeout=SOON) == [130, 130, 130], processes.screen.read_text()
    assert not (tmp_path / "finished").exists()


def test_the_own_signal_may_come_after_the_news_of_another_process(tmp_path):
    """Ctrl-C reaches one process after the other, in any state of the end that the first brings."""
    processes = Processes("evaluate", tmp_path, ALONE="100")
    processes.wait_for("alone")
    processes.kill(signal.SIGINT, ranks=[0])
    end = time.monotonic() + 0.7  # less than the second in which signals are one
    while time.monotonic() < end:
        processes.kill(signal.SIGINT, ranks=[1, 2])
        time.sleep(0.01)
    assert processes.finish(timeout=SOON) == [130, 130, 130], processes.screen.read_text()
