"""R-50 FCOS in ONNX Runtime and, where installed, in OpenVINO, beside PyTorch on CPU.

All have the same weights, as many candidates as a trained detector, and the same number of threads.
The detections of the files in float32 are compared before anything is timed. The same in INT8,
calibrated with random images. --trained DIR also gives the AP of both on the test set of a finished
training, of which INT8 is calibrated with training images.

    OMP_NUM_THREADS=2 python benchmarks/export.py [--size 800 1216] [--batch 1] [--repeats 7]
        [--trained DIR ...]
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from common import check_agreement, in_turns, machine, make_images
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from end_to_end import build_detectrons, build_ours
from tabulate import tabulate

from fcos_d2 import load_cfg
from fcos_d2.data import load_dataset
from fcos_d2.export import OnnxPredictor, to_onnx
from fcos_d2.export import int8 as int8_export
from fcos_d2.export.__main__ import calibration_images, load_model
from fcos_d2.export.int8 import quantize
from fcos_d2.inference.results import to_instances

try:
    import openvino
except ImportError:
    openvino = None


def onnx_runtime(file: Path, threads: int) -> Callable:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def open_vino(file: Path, threads: int) -> Callable:
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(file, "CPU", config)
    return lambda images: list(compiled(images).values())


def as_instances(outputs: list[np.ndarray], size: tuple[int, int]) -> list[Instances]:
    """Of each image, what an exported file gives."""
    detections = []
    for boxes, scores, classes, count in zip(*map(torch.from_numpy, outputs), strict=True):
        fields = {"pred_boxes": Boxes(boxes[:count]), "scores": scores[:count]}
        detections.append(Instances(size, **fields, pred_classes=classes[:count]))
    return detections


def average_precision(file: Path, name: str, records: list[dict], folder: str) -> float:
    evaluator = COCOEvaluator(name, ("bbox",), False, output_dir=folder)
    evaluator.reset()
    predictor = OnnxPredictor(file)
    for record in records:
        found = predictor(record["file_name"])["instances"]
        evaluator.process([record], [{"instances": to_instances(found)}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]["AP"]


def trained_rows(trained: str) -> list[list]:
    """AP and milliseconds an image of a finished training, in float32 and INT8."""
    cfg = load_cfg(f"{trained}/config.yaml", ["MODEL.WEIGHTS", f"{trained}/model_final.pth"])
    name = cfg.DATASETS.TEST[0]
    records = load_dataset(cfg, name)
    model, names, _ = load_model(cfg)
    with tempfile.TemporaryDirectory() as folder:
        exact, int8 = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        sizes = {"min_size": cfg.INPUT.MIN_SIZE_TEST, "max_size": cfg.INPUT.MAX_SIZE_TEST}
        to_onnx(model, exact, class_names=names, **sizes)
        check = quantize(exact, int8, calibration_images(cfg, None, 200))
        aps = [average_precision(file, name, records, folder) for file in (exact, int8)]
    return [[trained, *aps, aps[1] - aps[0], check.agreement, check.speed]]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--trained", nargs="*", default=[], metavar="DIR", help="OUTPUT_DIRs")
    args = parser.parse_args()

    torch.manual_seed(0)
    size, threads = tuple(args.size), torch.get_num_threads()
    batch = make_images(args.batch, size)
    detectrons = build_detectrons(batch[0], "cpu")
    model = build_ours(detectrons, "cpu", []).eval()
    images = torch.stack([x["image"] for x in batch]).float().numpy()
    functions = {"PyTorch": lambda: model(batch), "Detectron2's FCOS": lambda: detectrons(batch)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        begin = time.perf_counter()
        difference = to_onnx(model, file)
        print(
            f"exported in {time.perf_counter() - begin:.0f} s, {file.stat().st_size / 2**20:.0f} "
            f"MB, largest difference {difference:.1e}"
        )
        runtimes = {f"ONNX Runtime {onnxruntime.__version__}": onnx_runtime(file, threads)}
        if openvino is not None:
            runtimes[f"OpenVINO {version('openvino')}"] = open_vino(file, threads)
        int8 = Path(folder) / "int8.onnx"
        int8_export.LEAST_AGREEMENT = 0  # random weights make noise of rounding
        quantize(file, int8, [x["image"].permute(1, 2, 0).numpy() for x in make_images(8, size)])
        in_int8 = onnx_runtime(int8, threads)
    expected = [x["instances"] for x in model(batch)]
    for name, run in runtimes.items():
        share = check_agreement(name, as_instances(run(images), size), expected)
        print(f"{share:.1%} of {name}'s detections are PyTorch's")
        functions[name] = lambda run=run: run(images)
    functions[f"ONNX Runtime {onnxruntime.__version__}, INT8"] = lambda: in_int8(images)
    times = in_turns(functions, args.repeats, "cpu")
    print(machine("cpu"))
    print(f"{size[0]}x{size[1]}, batch {args.batch}")
    rows = [[name, x, times["PyTorch"] / x] for name, x in times.items()]
    print(tabulate(rows, headers=["runtime", "ms", "PyTorch / it"], floatfmt=(".0f", ".0f", ".2f")))
    rows = [row for trained in args.trained for row in trained_rows(trained)]
    if rows:
        headers = ["trained", "AP float32", "AP INT8", "difference", "agreement", "speed"]
        print(tabulate(rows, headers=headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
