"""How long the report's matching of detections takes, and how much memory, beside pycocotools.

    python benchmarks/report_evaluation.py [--images 5000] [--repeats 3]

Makes detections up, 100 an image, of 80 classes, and as many boxes an image as COCO's val2017 has.
Each side evaluates them with classes and without, in fresh processes, in turns. Detectron2's C++
(COCOeval_opt) makes the curves but keeps its matches to itself: with it, pycocotools matches once
more, at an IoU of 0.5 alone. Time and memory are those beyond the making of the data. On a machine
that does other work, too, compare the times of the processor.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import statistics
import subprocess
import sys
import time

import numpy as np
from common import machine
from detectron2.evaluation.fast_eval_api import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from startup import megabytes
from tabulate import tabulate

from fcos_d2.report import BoxEvaluation
from fcos_d2.report.evaluation import CURVE_IOUS, MATCH_IOU

BOXES_PER_IMAGE = 7.2  # as in COCO's val2017
DETECTIONS = 100  # of an image
CLASSES = 80


def make_data(images: int) -> tuple[COCO, list[dict]]:
    """Up to three detections near each box, the others anywhere."""
    rng = np.random.default_rng(0)
    boxes = _random_boxes(rng, round(images * BOXES_PER_IMAGE))
    image_of = np.sort(rng.integers(images, size=len(boxes)))
    class_of = rng.integers(CLASSES, size=len(boxes)) + 1
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 480, "width": 640} for i in range(images)],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(CLASSES)],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": category, "bbox": box,
             "area": box[2] * box[3], "iscrowd": int(i % 86 == 0)}
            for i, (image, category, box) in enumerate(
                zip(image_of.tolist(), class_of.tolist(), boxes.tolist(), strict=True)
            )
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    results = []
    for image in range(images):
        near = np.flatnonzero(image_of == image).repeat(3)[:DETECTIONS]
        found, classes = _random_boxes(rng, DETECTIONS), rng.integers(CLASSES, size=DETECTIONS) + 1
        found[: len(near)] = boxes[near] + rng.normal(0, 8, (len(near), 4))
        classes[: len(near)] = class_of[near]
        scores = rng.random(DETECTIONS) ** np.where(np.arange(DETECTIONS) < len(near), 1, 3)
        columns = classes.tolist(), found.clip(1).round(2).tolist(), scores.round(4).tolist()
        results += [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(*columns, strict=True)
        ]
    return truth, results


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform((0, 0, 5, 5), (400, 300, 240, 180), (count, 4)).round(2)


def ours(truth: COCO, results: list[dict]) -> list[np.ndarray]:
    """Precision without classes at CURVE_IOUS, AP of each class, and which detections are right."""
    evaluation = BoxEvaluation(truth, results)
    curves = [evaluation.precision_recall(iou)[1] for iou in CURVE_IOUS]
    of_classes = [evaluation.average_precision(category=c) for c in evaluation.class_names]
    matches = evaluation.matches()
    return [*curves, of_classes, np.sort(matches.detections[matches.right])]


def pycocotools(truth: COCO, results: list[dict]) -> list[np.ndarray]:
    by_class, agnostic = _passes(COCOeval, truth, results)
    return _numbers(by_class, agnostic, filter(None, by_class.evalImgs))


def detectron2(truth: COCO, results: list[dict]) -> list[np.ndarray]:
    by_class, agnostic = _passes(COCOeval_opt, truth, results)
    for evaluation, categories in ((agnostic, [-1]), (by_class, by_class.params.catIds)):
        params = evaluation.params
        params.iouThrs = [MATCH_IOU]
        matches = [
            evaluation.evaluateImg(image, category, params.areaRng[0], 100)
            for category in categories
            for image in params.imgIds
        ]
    return _numbers(by_class, agnostic, filter(None, matches))


def _passes(evaluation: type[COCOeval], truth: COCO, results: list[dict]) -> list[COCOeval]:
    with contextlib.redirect_stdout(io.StringIO()):
        detections = truth.loadRes(results)
        passes = [evaluation(truth, detections, "bbox") for _ in range(2)]
        params = passes[1].params
        params.useCats, params.iouThrs = 0, np.array(CURVE_IOUS)
        params.areaRng, params.maxDets = params.areaRng[:1], [100]
        for each in passes:
            each.evaluate()
            each.accumulate()
    return passes


def _numbers(by_class: COCOeval, agnostic: COCOeval, matches) -> list[np.ndarray]:
    precision = by_class.eval["precision"][:, :, :, 0, -1]
    right = {
        i
        for image in matches
        if image["aRng"] == by_class.params.areaRng[0]
        for i, box in zip(image["dtIds"], image["dtMatches"][0], strict=True)
        if box
    }
    of_classes = [100 * precision[:, :, i].mean() for i in range(precision.shape[2])]
    return [*agnostic.eval["precision"][:, :, 0, 0, 0], of_classes, sorted(right)]


WAYS = {"the report": ours, "pycocotools": pycocotools, "COCOeval_opt": detectron2}


def measure(way: str, images: int) -> None:
    """Print the seconds, those of the processor, the peak memory in MB, and what was found."""
    data = make_data(images)
    memory = megabytes("VmRSS")
    begin, begin_cpu = time.perf_counter(), time.process_time()
    numbers = WAYS[way](*data)
    seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    exact = np.concatenate([np.asarray(x, dtype=float) for x in numbers])
    found = [hashlib.sha256(x.tobytes()).hexdigest() for x in (exact, exact.round(9))]
    print(json.dumps([*seconds, megabytes("VmHWM") - memory, *found]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.images)
        return
    print(f"{machine('cpu')}; {args.images} images")
    measured, order = {way: [] for way in WAYS}, random.Random(0)
    for way in (w for _ in range(args.repeats) for w in order.sample(list(WAYS), len(WAYS))):
        command = [sys.executable, __file__, "--measure", way, "--images", str(args.images)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        measured[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows, (*theirs, exact, rounded) = [], _medians(measured["pycocotools"])
    for way, of_way in measured.items():
        *numbers, found, nearly = _medians(of_way)
        pairs = zip(numbers, theirs, strict=True)
        columns = (x for a, b in pairs for x in (f"{a:,.1f}", f"{a / b:.3f}"))
        same = "every bit" if found == exact else "9 digits" if nearly == rounded else "no"
        rows.append((way, *columns, same))
    header = ("", "s", "ratio", "CPU s", "ratio", "MB", "ratio", "equal")
    print(tabulate(rows, header, disable_numparse=True))


def _medians(rows: list[list]) -> list:
    *numbers, exact, rounded = zip(*rows, strict=True)
    return [*map(statistics.median, numbers), exact[0], rounded[0]]


if __name__ == "__main__":
    main()
