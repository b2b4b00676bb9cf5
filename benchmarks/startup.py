"""How long a training takes to load data of COCO's size, and how much memory, beside Detectron2.

    python benchmarks/startup.py [--images 118000] [--processes 1 2] [--repeats 3]
        [--ways coco folder file registered] [--folder DIR]

Makes annotation files as large as COCO's, with polygons and crowds, and images for them, which are
links to a few small files. Each measurement is made in fresh processes, in turns. Ours includes all
checks and the loading of a test set of a twentieth; Detectron2 loads the training set alone. Time
and memory are those beyond the imports; the memory is the most that one process holds. On a machine
that does other work, too, compare the times of the processor.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from common import machine
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import launch
from detectron2.utils import comm
from tabulate import tabulate

from fcos_d2 import get_cfg as get_fcos_cfg
from fcos_d2.data import check_test_sets, register_custom_datasets
from fcos_d2.data.layouts import use_data
from fcos_d2.engine import Trainer

BOXES_PER_IMAGE = 7.29  # as in COCO's train2017
WAYS = {
    "coco": "DATASETS.CUSTOM, FORMAT coco",
    "folder": "--data FOLDER",
    "file": "--data FILE, a tenth held out",
    "registered": "registered with Detectron2",
    "detectron2": "Detectron2",
}
_LINKS = 20000  # file systems allow some 65,000 links to a file


def write_data(folder: Path, split: str, images: int, seed: int) -> None:
    """A folder of images and an annotation file, in COCO's own layout and order of entries."""
    rng = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    ids = rng.choice(10**6, images, replace=False) + 1
    names = [f"{i:012d}.jpg" for i in ids]
    pixels = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    for i, name in enumerate(names):
        if i % _LINKS == 0:
            source = folder / split / name
            source.write_bytes(pixels)
        else:
            os.link(source, folder / split / name)
    listed = [
        {"license": 3, "file_name": name, "coco_url": f"http://images.cocodataset.org/{name}",
         "height": 480, "width": 640, "date_captured": "2013-11-14 17:02:52",
         "flickr_url": f"http://farm7.staticflickr.com/6116/{name}", "id": int(i)}
        for i, name in zip(ids, names, strict=True)
    ]  # fmt: skip
    categories = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in range(2, 82)]
    annotations = [
        _annotation(rng, number, int(image))
        for number, image in enumerate(rng.choice(ids, round(images * BOXES_PER_IMAGE)), 1)
    ]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    file = folder / "annotations" / f"instances_{split}.json"
    content = {"info": {"year": 2017}, "licenses": [], **content}
    file.write_text(json.dumps(content, separators=(",", ":")))


def _annotation(rng: np.random.Generator, number: int, image: int) -> dict:
    """A polygon with about 23 corners, now and then two, or a crowd as a run-length code."""
    x, y, width, height = rng.uniform((0, 0, 5, 5), (400, 300, 240, 180)).round(2).tolist()
    is_crowd = number % 86 == 0
    if is_crowd:
        counts = rng.integers(1, 3000, 200)
        counts = [*counts.tolist(), 640 * 480 - int(counts.sum()) % (640 * 480)]
        segmentation = {"counts": counts, "size": [480, 640]}
    else:
        lengths = rng.lognormal(2.8, 0.6, 1 + (number % 6 == 0)).astype(int) + 3
        segmentation = [
            rng.uniform((x, y), (x + width, y + height), (n, 2)).round(2).ravel().tolist()
            for n in lengths
        ]
    return {"segmentation": segmentation, "area": round(width * height * 0.6, 4),
            "iscrowd": int(is_crowd), "image_id": image, "bbox": [x, y, width, height],
            "category_id": int(rng.integers(2, 82)), "id": number}  # fmt: skip


def build_detectrons(folder: Path) -> None:
    register_coco_instances("train", {}, *_paths(folder, "train"))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("train",)
    build_detection_train_loader(cfg, mapper=dict)


def build_ours(folder: Path, way: str) -> None:
    cfg = get_fcos_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.FCOS.NUM_CLASSES = "FCOS", 80
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    read = {}
    if way == "coco":
        for name in ("train", "val"):
            json_file, images = _paths(folder, name)
            entry = {"FORMAT": "coco", "JSON": json_file, "IMAGES": images}
            cfg.DATASETS.CUSTOM[name] = CfgNode(entry, new_allowed=True)
    elif way == "registered":
        for name in ("train", "val"):
            register_coco_instances(name, {}, *_paths(folder, name))
    else:
        path = folder if way == "folder" else _paths(folder, "train")[0]
        _, read = use_data(cfg, str(path))
    register_custom_datasets(cfg, read)
    check_test_sets(cfg)
    Trainer.build_train_loader(cfg)


def _paths(folder: Path, split: str) -> tuple[str, str]:
    return str(folder / "annotations" / f"instances_{split}.json"), str(folder / split)


def measure(folder: Path, way: str, out: str) -> None:
    """Write the seconds, those of the processor, and the peak memory in MB of this process."""
    torch.set_num_threads(1)
    memory = megabytes("VmRSS")
    comm.synchronize()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    if way == "detectron2":
        build_detectrons(folder)
    else:
        build_ours(folder, way)
    cpu = time.process_time() - begin_cpu
    comm.synchronize()  # a training begins when the last process is ready
    numbers = time.perf_counter() - begin, cpu, megabytes("VmHWM") - memory
    Path(f"{out}_{comm.get_rank()}").write_text(json.dumps(numbers))


def megabytes(key: str) -> float:
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key)) / 1024


def measure_in_fresh_processes(folder: Path, way: str, processes: int) -> list[float]:
    """What :func:`measure` writes, each number of the process that needs the most."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, __file__, "--folder", str(folder), "--measure", way]
        command += ["--out", f"{results}/numbers", "--processes", str(processes)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        numbers = [json.loads(file.read_text()) for file in Path(results).iterdir()]
    assert len(numbers) == processes
    return [max(x) for x in zip(*numbers, strict=True)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the data here, or take what is there")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.measure:
        of_process = (args.folder, args.measure, args.out)
        launch(measure, args.processes[0], dist_url="auto", args=of_process)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "annotations").is_dir():
            write_data(folder, "train", args.images, 0)
            write_data(folder, "val", args.images // 20, 1)
        size = (folder / "annotations" / "instances_train.json").stat().st_size
        print(f"{machine('cpu')}; the annotation file has {size / 2**20:.0f} MB")
        ways, order = list(dict.fromkeys([*args.ways, "detectron2"])), random.Random(0)
        for processes in args.processes:
            measured = {way: [] for way in ways}
            for way in (w for _ in range(args.repeats) for w in order.sample(ways, len(ways))):
                measured[way].append(measure_in_fresh_processes(folder, way, processes))
            medians = {
                way: [statistics.median(x) for x in zip(*of_way, strict=True)]
                for way, of_way in measured.items()
            }
            theirs = medians["detectron2"]
            rows = []
            for way, ours in medians.items():
                pairs = zip(ours, theirs, strict=True)
                numbers = [x for a, b in pairs for x in (f"{a:,.1f}", f"{a / b:.2f}")]
                rows.append((WAYS[way], *numbers))
            header = (f"{processes} process(es)", "s", "ratio", "CPU s", "ratio", "MB", "ratio")
            print(f"\n{tabulate(rows, header, disable_numparse=True)}", flush=True)


if __name__ == "__main__":
    main()
