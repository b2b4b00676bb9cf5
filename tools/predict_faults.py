#!/usr/bin/env python
"""Hurt small predictions in many ways, and see whether --resume makes them what they should be.

    python tools/predict_faults.py [--kills 5] [--folder output/predict_faults] [--only kill]

Kills, signals, a full disk, a cut line and unreadable images, in one and two processes on CPU.
After each fault the command runs again with --resume. It survives if results.json then is that of
an undisturbed run, up to rounding, and if all pictures are there. Takes five minutes on two cores;
exits with 1 if a prediction does not survive. That of trainings is fault_injection.py.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from fcos_d2 import load_cfg
from fcos_d2.data import make_shapes_dataset

CONFIG = "configs/quick_schedules/fcos_R_18_FPN_shapes.yaml"
# So many detections that an order of their scores that rounding changes would be noticed.
PRIOR_PROB = 0.3


class Prediction:
    """A prediction in its own folder, which starts again and again."""

    def __init__(self, folder: Path, name: str):
        self.output, self.images = folder / name, folder / f"{name}_images"
        for path in (self.output, self.images):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder / "shapes" / "val", self.images)
        self.weights, self.log = folder / "weights.pth", folder / f"{name}.log"
        self.log.write_text("")

    def start(self, processes: int = 1, resume: bool = False, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "fcos_d2.predict", "--weights", self.weights, "--json"]
        command += ["--input", self.images, "--output", self.output, "--batch-size", 2]
        command += ["--num-gpus", processes, *(["--resume"] if resume else [])]
        return subprocess.Popen(
            list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self.log.open("a"), stderr=subprocess.STDOUT, start_new_session=True, **options,
        )  # fmt: skip

    def wait_for_lines(self, process: subprocess.Popen, count: int) -> None:
        """Wait until so many images are done."""
        while process.poll() is None and self.lines() < count:
            time.sleep(0.02)

    def lines(self) -> int:
        return sum(x.read_bytes().count(b"\n") for x in self.output.glob("results.*.jsonl"))

    def results(self) -> dict:
        return json.loads((self.output / "results.json").read_text())


def kill(prediction: Prediction, number: int, processes: int, times: int) -> str:
    rng, done = random.Random(0), []
    for i in range(times):
        process = prediction.start(processes, resume=i > 0)
        prediction.wait_for_lines(process, prediction.lines() + rng.randint(1, 4))
        os.killpg(process.pid, number)
        code = process.wait(timeout=60)
        done.append(prediction.lines())
        if code == 0:
            raise RuntimeError("exit code 0")
    return f"exit code {code}, images done after each: {done}"


def kill_one(prediction: Prediction) -> str:
    """The second of two processes is lost; the first must end within seconds."""
    process = prediction.start(2)
    prediction.wait_for_lines(process, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    begin = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    code = process.wait(timeout=60)
    if code == 0:
        raise RuntimeError("exit code 0")
    return f"exit code {code} after {time.monotonic() - begin:.1f} s"


def full_disk(prediction: Prediction) -> str:
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = prediction.start(preexec_fn=no_large_files).wait()
    if code == 0 or (prediction.output / "results.json").exists():
        raise RuntimeError(f"exit code {code}, results.json is there")
    return f"exit code {code}, {prediction.lines()} images done, no results.json"


def cut_line(prediction: Prediction) -> str:
    kill(prediction, signal.SIGKILL, 1, 1)
    (file,) = prediction.output.glob("results.*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    return "the last line lacks 20 bytes"


def unreadable(prediction: Prediction) -> str:
    """The command says which file it is, and a later run makes up for it."""
    file = min(prediction.images.iterdir())
    content = file.read_bytes()
    file.write_bytes(b"no image")
    process = prediction.start()
    code = process.wait()
    file.write_bytes(content)
    if code != 1 or f"{file}: cannot identify" not in prediction.log.read_text():
        raise RuntimeError(f"exit code {code}")
    missing = len(list(prediction.images.iterdir())) - len(prediction.results()["images"])
    if missing != 1:
        raise RuntimeError(f"{missing} images are missing")
    (prediction.output / "results.json").unlink()
    return "exit code 1, the file is named, all others are there"


def difference(a: dict, b: dict) -> float:
    """The largest one of a score or a coordinate in pixels; infinite for other detections."""
    if a["images"] != b["images"] or a["categories"] != b["categories"]:
        return math.inf
    rows = []
    for results in (a, b):
        of_images: dict[int, list] = {image["id"]: [] for image in results["images"]}
        for x in results["annotations"]:
            of_images[x["image_id"]].append((x["category_id"], *x["bbox"], x["score"]))
        rows.append([sorted(found) for found in of_images.values()])
    of_a, of_b = ([len(found) for found in side] for side in rows)
    if of_a != of_b:
        return math.inf
    pairs = zip(*([row for found in side for row in found] for side in rows), strict=True)
    return max(abs(x - y) for pair in pairs for x, y in zip(*pair, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("output/predict_faults"))
    parser.add_argument("--only", default="", help="part of the names of the faults to inject")
    args = parser.parse_args()
    folder = args.folder.resolve()
    make_shapes_dataset(folder / "shapes")
    torch.manual_seed(0)
    cfg = load_cfg(CONFIG, ["MODEL.FCOS.PRIOR_PROB", PRIOR_PROB, "MODEL.DEVICE", "cpu"])
    model = {"model": build_model(cfg).state_dict(), "config": cfg.dump()}
    torch.save(model, folder / "weights.pth")

    undisturbed = Prediction(folder, "undisturbed")
    undisturbed.start().wait()
    faults: dict[str, Callable[[Prediction], str]] = {
        "SIGKILL, several times": lambda p: kill(p, signal.SIGKILL, 1, args.kills),
        "SIGKILL of two processes": lambda p: kill(p, signal.SIGKILL, 2, args.kills),
        "SIGKILL of one of two": kill_one,
        "SIGINT": lambda p: kill(p, signal.SIGINT, 1, 1),
        "SIGINT, two processes": lambda p: kill(p, signal.SIGINT, 2, 1),
        "SIGTERM": lambda p: kill(p, signal.SIGTERM, 1, 1),
        "disk full": full_disk,
        "a line is cut": cut_line,
        "a file is no image": unreadable,
    }
    rows = []
    for number, (fault, inject) in enumerate(faults.items()):
        if args.only not in fault:
            continue
        prediction = Prediction(folder, f"fault_{number}")
        try:
            what = inject(prediction)
            code = prediction.start(resume=True).wait()
            pictures = {x.name for x in prediction.output.iterdir() if cv2.haveImageReader(str(x))}
            largest = difference(prediction.results(), undisturbed.results())
            survived = code == 0 and largest < 0.01
            survived &= pictures == {x.name for x in prediction.images.iterdir()}
        except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            what, largest, survived = f"{error!r}; see {prediction.log}", math.nan, False
        rows.append([fault, "yes" if survived else "NO", largest, what])
        print(f"{fault}: {rows[-1][1:]}", flush=True)
    print(tabulate(rows, ["fault", "survived", "largest difference", "what happened"]))
    if any(row[1] == "NO" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
