#!/usr/bin/env python
"""Hurt small trainings in many ways, and see whether they end as undisturbed ones do.

    python tools/fault_injection.py [--kills 20] [--folder output/faults] [--only torchrun]

Kills, signals, damaged checkpoints, a full disk, a folder that cannot be written to, and files that
would run code, in one and two processes on CPU; signals, kills and errors of one process of two,
which --num-gpus, torchrun or srun (its variables alone) has started. After each fault the run is
resumed. It survives if its weights are those of an undisturbed run or, on another number of
processes, if it ends. Takes half an hour on two cores; exits with 1 if a run does not survive.
"""

import argparse
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from tabulate import tabulate

from fcos_d2.data import make_shapes_dataset

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quick_schedules/fcos_R_18_FPN_shapes.yaml"
NUM_ITERATIONS, PERIOD = 40, 5
MIXED = "1 and 2"  # processes
SETTINGS = [
    "MODEL.FCOS.NUM_CLS_CONVS", 1, "MODEL.FCOS.NUM_BOX_CONVS", 1, "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.MAX_ITER", NUM_ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", PERIOD, "SEED", 1,
    "TEST.EVAL_PERIOD", 20, "DATALOADER.NUM_WORKERS", 2,
]  # fmt: skip


class Job:
    """The processes that a launcher starts; with srun there are as many as the run has."""

    def __init__(self, processes: list[subprocess.Popen]):
        self.processes = processes

    def poll(self) -> int | None:
        codes = [process.poll() for process in self.processes]
        return None if None in codes else max(map(abs, codes))

    def wait(self, timeout: float = 600) -> int:
        """The exit code, of several processes the largest; that of a signal is positive."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(0.1, end - time.monotonic()))
        return self.poll()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal all processes, as a cluster does."""
        for process in self.processes:
            os.killpg(process.pid, number)

    def trainers(self) -> list[int]:
        """The processes that train, by rank, without those that load images."""
        if len(self.processes) > 1:
            return [process.pid for process in self.processes]
        launcher = self.processes[0].pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        commands = {int(x): Path(f"/proc/{x}/cmdline").read_text() for x in children}
        return sorted(x for x, command in commands.items() if "resource_tracker" not in command)


class Run:
    """A training in its own folder, which starts again and again."""

    def __init__(self, folder: Path, name: str, processes: int = 1, launcher: str = "--num-gpus"):
        self.output, self.processes, self.launcher = folder / name, processes, launcher
        self.env = os.environ | {"DETECTRON2_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}
        shutil.rmtree(self.output, ignore_errors=True)
        self.log = folder / f"{name}.log"
        self.log.write_text("")

    def start(
        self, config: str | Path = CONFIG, weights: str | Path = "", **options: object
    ) -> Job:
        arguments = ["train_net.py", "--config-file", config, "--resume", "--dist-url", "auto"]
        before, envs = [], [{}]
        if self.launcher == "--num-gpus":
            arguments += ["--num-gpus", self.processes]
        elif self.launcher == "torchrun":
            before = ["-m", "torch.distributed.run", "--nproc-per-node", self.processes]
            before += ["--master-port", free_port()]
        else:
            job = {"SLURM_NTASKS": str(self.processes), "MASTER_PORT": free_port()}
            ranks = map(str, range(self.processes))
            envs = [job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ranks]
        command = [sys.executable, *before, *arguments, *SETTINGS, "MODEL.WEIGHTS", weights]
        started = [
            subprocess.Popen(
                [*map(str, command), "OUTPUT_DIR", str(self.output)],
                cwd=ROOT,
                env=self.env | env,
                stdout=self.log.open("a"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
            for env in envs
        ]
        return Job(started)

    def finish(self, **options: object) -> int:
        return self.start(**options).wait()

    def start_and_kill(self, checkpoints: int) -> None:
        """Kill it as soon as it has written this many."""
        process = self.start()
        self.wait_for_checkpoints(process, checkpoints)
        process.kill()
        process.wait()

    def wait_for_checkpoints(self, process: Job, count: int) -> None:
        while process.poll() is None and len(self.checkpoints()) < count:
            time.sleep(0.02)

    def checkpoints(self) -> list[Path]:
        return sorted(self.output.glob("model_0*.pth"), key=os.path.getmtime)

    def wait_for(self, process: Job, text: str) -> None:
        """Wait until the log has the text once more."""
        before = self.log.read_text().count(text)
        while process.poll() is None and self.log.read_text().count(text) == before:
            time.sleep(0.02)

    def logged_losses(self) -> list[int]:
        """The iterations whose losses are in metrics.json."""
        rows = map(json.loads, (self.output / "metrics.json").read_text().splitlines())
        return [row["iteration"] for row in rows if "total_loss" in row]

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.output / "model_final.pth")["model"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def random_kills(run: Run, count: int, seconds: float) -> str:
    rng = random.Random(0)
    for _ in range(count):
        process = run.start()
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    run.finish()
    resumed = run.log.read_text().count("Starting training from iteration")
    return f"{count} kills, training reached {resumed} times"


def stop_signal(
    run: Run, number: int, evaluating: bool, code: int, start_on: int, resume_on: int
) -> str:
    """``start_on``, ``resume_on``: numbers of processes before the signal and after it."""
    run.processes = start_on
    process = run.start()
    if evaluating:
        run.wait_for(process, "Start inference on")
    else:
        run.wait_for_checkpoints(process, 1)
    begin = time.monotonic()
    process.kill(number)
    exit_code = process.wait(timeout=120)
    seconds = time.monotonic() - begin
    if exit_code != code:
        raise RuntimeError(f"exit code {exit_code}, not {code}")
    saved = run.checkpoints()[-1].name
    run.processes = resume_on
    run.finish()
    return f"exit code {exit_code} after {seconds:.1f} s with {saved}"


def two_processes(run: Run, fault: str) -> str:
    """Something happens to both processes, or to the second one; both must end within seconds."""
    process = run.start()
    if fault.endswith("in the evaluation"):
        run.wait_for(process, "Start inference on")
    elif fault.endswith("in the report"):  # after the second evaluation
        run.wait_for(process, "model_best.pth is")
        run.wait_for(process, "model_best.pth is")
    else:
        run.wait_for_checkpoints(process, 1)
    first, second = process.trainers()
    images = run.output.parent / "shapes" / "train"
    begin = time.monotonic()
    if fault.startswith("SIGTERM to all"):
        process.kill(signal.SIGTERM)
    elif fault.startswith("SIGTERM to one"):
        os.kill(second, signal.SIGTERM)
    elif fault == "SIGKILL of one":
        os.kill(second, signal.SIGKILL)
    elif fault == "SIGTERM twice while it waits":
        os.kill(second, signal.SIGSTOP)
        time.sleep(1)
        os.kill(first, signal.SIGTERM)
        time.sleep(1.5)
        begin = time.monotonic()
        os.kill(first, signal.SIGTERM)
        while is_running(first):
            time.sleep(0.02)
        os.kill(second, signal.SIGCONT)
    else:  # its images have gone
        images.rename(images.with_name("hidden"))
    try:
        code = process.wait(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        if images.with_name("hidden").exists():
            images.with_name("hidden").rename(images)
    seconds = time.monotonic() - begin
    if code == 0 and "report" not in fault:
        raise RuntimeError("exit code 0")
    if seconds > 15:
        raise RuntimeError(f"ended after {seconds:.1f} s")
    last = [line for line in run.log.read_text().splitlines() if line.strip()][-1]
    run.finish()
    return f"exit code {code} after {seconds:.1f} s; last line: {last[:60]}"


def damaged_checkpoint(run: Run, damage: Callable[[bytes], bytes]) -> str:
    run.start_and_kill(checkpoints=4)
    last = run.output / (run.output / "last_checkpoint").read_text()
    last.write_bytes(damage(last.read_bytes()))
    run.finish()
    if f"{str(last)!r} is missing or damaged: resuming from" not in run.log.read_text():
        raise RuntimeError("the damage was not noticed")
    return f"{last.name} was passed over"


def full_disk(run: Run) -> str:
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    run.start_and_kill(checkpoints=2)
    before = [p.name for p in run.checkpoints()]
    code = run.finish(preexec_fn=no_large_files)
    if code == 0 or list(run.output.glob("*.partial")):
        raise RuntimeError(f"exit code {code}, left: {list(run.output.glob('*.partial'))}")
    if [p.name for p in run.checkpoints()] != before:
        raise RuntimeError("checkpoints were lost or are incomplete")
    run.finish()
    return f"exit code {code}, earlier checkpoints kept, no partial file"


def read_only_folder(run: Run) -> str:
    if os.geteuid() == 0:  # root may write everywhere, but not into a file's folder
        run.output.write_text("a file in the place of the folder")
    else:
        run.output.mkdir()
        run.output.chmod(0o555)
    begin = time.monotonic()
    code = run.finish()
    seconds = time.monotonic() - begin
    if os.geteuid() == 0:
        run.output.unlink()
    else:
        run.output.chmod(0o755)
    if code == 0 or "Starting training" in run.log.read_text():
        raise RuntimeError(f"exit code {code} after training")
    run.finish()
    return f"exit code {code} after {seconds:.0f} s, before the first iteration"


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def payload(run: Run, name: str) -> str:
    """Start from a file that would run code, then without it."""
    run.output.mkdir()
    file, ran = run.output / name, run.output / "ran"
    options = {}
    if name == "config.yaml":
        file.write_text(
            f"_BASE_: {ROOT / CONFIG}\nSEED: !!python/object/apply:os.mkdir ['{ran}']\n"
        )
        options["config"] = file
    elif name.endswith(".pkl"):
        file.write_bytes(pickle.dumps({"model": Payload(ran)}))
    else:
        torch.save({"model": Payload(ran)}, file)
    if name.startswith("weights"):
        options["weights"] = file
    code = run.finish(**options)
    if ran.exists() or code == 0 or "Nothing was run" not in run.log.read_text():
        raise RuntimeError(f"exit code {code}, the code has run: {ran.exists()}")
    file.unlink()
    run.finish()
    return f"exit code {code}, the code was not run"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("output/faults"))
    parser.add_argument("--only", default="", help="part of the names of the faults to inject")
    args = parser.parse_args()
    folder = args.folder.resolve()
    make_shapes_dataset(folder / "shapes")

    begin = time.monotonic()
    undisturbed = {1: Run(folder, "undisturbed")}
    undisturbed[1].finish()
    seconds = time.monotonic() - begin
    undisturbed[2] = Run(folder, "undisturbed_2", processes=2)
    undisturbed[2].finish()
    # Each process pads its own images: with another number of them the weights cannot be the same.
    undisturbed[MIXED] = undisturbed[1]

    stops = {
        "SIGTERM in training": (1, signal.SIGTERM, False, 143, 1, 1),
        "SIGINT in training": (1, signal.SIGINT, False, 130, 1, 1),
        "SIGUSR1 in training": (1, signal.SIGUSR1, False, 143, 1, 1),
        "SIGTERM in evaluation": (1, signal.SIGTERM, True, 143, 1, 1),
        "SIGTERM in evaluation, 2 processes": (2, signal.SIGTERM, True, 143, 2, 2),
        "SIGTERM, from 2 processes to 1": (MIXED, signal.SIGTERM, False, 143, 2, 1),
        "SIGTERM, from 1 process to 2": (MIXED, signal.SIGTERM, False, 143, 1, 2),
    }
    damages = {
        "cut short": lambda x: x[: len(x) // 2],
        "64 bytes zeroed": lambda x: x[: len(x) // 2] + bytes(64) + x[len(x) // 2 + 64 :],
        "empty": lambda x: b"",
    }
    of_two = (
        "SIGTERM to all in training", "SIGTERM to one in training",
        "SIGTERM to all in the evaluation", "SIGTERM to one in the evaluation",
        "SIGTERM to all in the report", "SIGTERM twice while it waits", "SIGKILL of one",
        "an error",
    )  # fmt: skip
    launched = {
        f"{fault}, {launcher}": (launcher, fault)
        for launcher in ("--num-gpus", "torchrun", "srun")
        for fault in of_two
    }
    faults: dict[str, tuple[int | str, Callable[[Run], str]]] = {
        "killed at random moments": (1, lambda r: random_kills(r, args.kills, seconds)),
        "killed at random moments, 2 processes": (2, lambda r: random_kills(r, 5, seconds)),
        **{name: (kind, lambda r, stop=stop: stop_signal(r, *stop))
           for name, (kind, *stop) in stops.items()},
        **{name: (2, lambda r, fault=fault: two_processes(r, fault))
           for name, (_, fault) in launched.items()},
        **{f"last checkpoint {name}": (1, lambda r, damage=damage: damaged_checkpoint(r, damage))
           for name, damage in damages.items()},
        "disk full while saving": (1, full_disk),
        "folder that cannot be written to": (1, read_only_folder),
        **{f"code in {name}": (1, lambda r, name=name: payload(r, name))
           for name in ("weights.pkl", "weights.pth", "model_final.pth", "config.yaml")},
    }  # fmt: skip
    rows = []
    for number, (fault, (kind, inject)) in enumerate(faults.items()):
        if args.only not in fault:
            continue
        launcher, _ = launched.get(fault, ("--num-gpus", None))
        run = Run(folder, f"fault_{number}", 2 if kind == 2 else 1, launcher)
        try:
            what = inject(run)
            difference = largest_difference(run.weights(), undisturbed[kind].weights())
            survived = math.isfinite(difference) if kind == MIXED else difference == 0
            # metrics.json has each iteration once.
            survived &= len(set(run.logged_losses())) == len(run.logged_losses())
        except (RuntimeError, OSError, LookupError, subprocess.TimeoutExpired) as error:
            what, difference, survived = f"{error!r}; see {run.log}", float("nan"), False
        if survived:  # half a gigabyte of checkpoints
            shutil.rmtree(run.output)
        rows.append([fault, "yes" if survived else "NO", difference, what])
        print(f"{fault}: {rows[-1][1:]}", flush=True)
    print(tabulate(rows, ["fault", "survived", "largest difference of a weight", "what happened"]))
    if any(row[1] == "NO" for row in rows):
        sys.exit(1)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in b)


if __name__ == "__main__":
    main()
