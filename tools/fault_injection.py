#!/usr/bin/env python
"""Hurt small trainings in many ways, and see whether they end as undisturbed ones do.

    python tools/fault_injection.py [--kills 20] [--folder output/faults]

Kills, signals, damaged checkpoints, a full disk, a folder that cannot be written to, and files that
would run code, in one and two processes on CPU. After each fault the run is resumed. It survives if
its weights are those of an undisturbed run or, on another number of processes, if it ends. Takes
about ten minutes on two cores; exits with 1 if a run does not survive.
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
import subprocess
import sys
import time
from collections.abc import Callable
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


class Run:
    """A training in its own folder, which starts again and again."""

    def __init__(self, folder: Path, name: str, processes: int = 1):
        self.output, self.processes = folder / name, processes
        self.env = os.environ | {"DETECTRON2_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}
        shutil.rmtree(self.output, ignore_errors=True)
        self.log = folder / f"{name}.log"
        self.log.write_text("")

    def start(
        self, config: str | Path = CONFIG, weights: str | Path = "", **options: object
    ) -> subprocess.Popen:
        command = [sys.executable, "train_net.py", "--config-file", config, "--resume"]
        command += ["--num-gpus", self.processes, "--dist-url", "auto", *SETTINGS]
        command += ["MODEL.WEIGHTS", weights]
        return subprocess.Popen(
            [*map(str, command), "OUTPUT_DIR", str(self.output)],
            cwd=ROOT,
            env=self.env,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )

    def finish(self, **options: object) -> int:
        return self.start(**options).wait(timeout=600)

    def start_and_kill(self, checkpoints: int) -> None:
        """Kill it as soon as it has written this many."""
        process = self.start()
        self.wait_for_checkpoints(process, checkpoints)
        kill_all(process)
        process.wait()

    def wait_for_checkpoints(self, process: subprocess.Popen, count: int) -> None:
        while process.poll() is None and len(self.checkpoints()) < count:
            time.sleep(0.02)

    def checkpoints(self) -> list[Path]:
        return sorted(self.output.glob("model_0*.pth"), key=os.path.getmtime)

    def wait_for(self, process: subprocess.Popen, text: str) -> None:
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


def kill_all(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Signal the whole session, as a cluster does."""
    os.killpg(process.pid, number)


def random_kills(run: Run, count: int, seconds: float) -> str:
    rng = random.Random(0)
    for _ in range(count):
        process = run.start()
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            kill_all(process)
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
    kill_all(process, number)
    exit_code = process.wait(timeout=120)
    seconds = time.monotonic() - begin
    if exit_code != code:
        raise RuntimeError(f"exit code {exit_code}, not {code}")
    saved = run.checkpoints()[-1].name
    run.processes = resume_on
    run.finish()
    return f"exit code {exit_code} after {seconds:.1f} s with {saved}"


def damaged_checkpoint(run: Run, damage: Callable[[bytes], bytes]) -> str:
    run.start_and_kill(checkpoints=4)
    last = run.output / (run.output / "last_checkpoint").read_text()
    last.write_bytes(damage(last.read_bytes()))
    run.finish()
    if f"{last} is missing or damaged: resuming from" not in run.log.read_text():
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
    faults: dict[str, tuple[int | str, Callable[[Run], str]]] = {
        "killed at random moments": (1, lambda r: random_kills(r, args.kills, seconds)),
        "killed at random moments, 2 processes": (2, lambda r: random_kills(r, 5, seconds)),
        **{name: (kind, lambda r, stop=stop: stop_signal(r, *stop))
           for name, (kind, *stop) in stops.items()},
        **{f"last checkpoint {name}": (1, lambda r, damage=damage: damaged_checkpoint(r, damage))
           for name, damage in damages.items()},
        "disk full while saving": (1, full_disk),
        "folder that cannot be written to": (1, read_only_folder),
        **{f"code in {name}": (1, lambda r, name=name: payload(r, name))
           for name in ("weights.pkl", "weights.pth", "model_final.pth", "config.yaml")},
    }  # fmt: skip
    rows = []
    for number, (fault, (kind, inject)) in enumerate(faults.items()):
        run = Run(folder, f"fault_{number}", 2 if kind == 2 else 1)
        try:
            what = inject(run)
            difference = largest_difference(run.weights(), undisturbed[kind].weights())
            survived = math.isfinite(difference) if kind == MIXED else difference == 0
            # metrics.json has each iteration once.
            survived &= len(set(run.logged_losses())) == len(run.logged_losses())
        except (RuntimeError, OSError, LookupError, subprocess.TimeoutExpired) as error:
            what, difference, survived = f"{error!r}; see {run.log}", float("nan"), False
        rows.append([fault, "yes" if survived else "NO", difference, what])
        print(f"{fault}: {rows[-1][1:]}", flush=True)
    print(tabulate(rows, ["fault", "survived", "largest difference of a weight", "what happened"]))
    if any(row[1] == "NO" for row in rows):
        sys.exit(1)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in b)


if __name__ == "__main__":
    main()
