"""Images a second of the predict command, beside each of its parts alone and a plain loop.

    python benchmarks/prediction.py [--images 48] [--size 320] [--repeats 3]

The command reads, resizes, draws and writes while the network runs: its time should be that of the
slowest part, and not the sum. The plain loop is that of Detectron2's demo: DefaultPredictor and
Visualizer, one image after the other, of the same model. Random images of 640x480 as JPEG, and
weights with as many detections as a trained detector has.
"""

import argparse
import contextlib
import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from common import default_device, machine, make_images, spread_logits
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from tabulate import tabulate

from fcos_d2 import Predictor, load_cfg, model_zoo
from fcos_d2.inference import predict
from fcos_d2.inference.drawing import draw_instances

THRESHOLD = 0.3  # of scores that are drawn


def save_weights(cfg: CfgNode, files: list[Path], target: str) -> None:
    cfg.MODEL.WEIGHTS = ""
    predictor = Predictor(cfg)
    model = predictor.model
    spread_logits(model.head.cls_logits, lambda: predictor(cv2.imread(str(files[0]))), THRESHOLD)
    torch.save({"model": model.state_dict(), "config": cfg.dump()}, target)


def command(weights: str, folder: Path, output: str) -> float:
    """Seconds that the command itself says, without start and loading."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        options = ["--output", output, "--json", "--threshold", str(THRESHOLD)]
        predict.main(["--weights", weights, "--input", str(folder), *options])
    return float(re.search(r"images in ([0-9.]+) s", said.getvalue())[1])


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quick_schedules/fcos_R_18_FPN_shapes.yaml")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--size", type=int, default=320, help="shorter side of the network's input")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary, "images"), Path(temporary, "output")
        folder.mkdir()
        output.mkdir()
        files = [folder / f"{i:05d}.jpg" for i in range(args.images)]
        for file, image in zip(files, make_images(args.images, (480, 640)), strict=True):
            cv2.imwrite(str(file), image["image"].permute(1, 2, 0).numpy())
        cfg = load_cfg(model_zoo.get_config_file(args.config))
        cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.DEVICE = args.size, default_device()
        weights = str(Path(temporary, "weights.pth"))
        save_weights(cfg, files, weights)
        cfg.MODEL.WEIGHTS = weights

        ours, plain = Predictor(cfg), DefaultPredictor(cfg)
        metadata = Metadata(name="benchmark")
        pixels = [read_image(str(file), "BGR") for file in files]
        inputs = [ours.model_input(x, "BGR") for x in pixels]
        found = [x["instances"].to("cpu") for x in ours.stream(pixels)]
        drawn = [int((x.scores >= THRESHOLD).sum()) for x in found]

        def write(file: Path, picture: object) -> None:
            cv2.imwrite(str(output / file.name), picture)

        @torch.no_grad()
        def network() -> None:
            for begin in range(0, len(inputs), ours.batch_size):
                ours.model(inputs[begin : begin + ours.batch_size])

        def read_and_resize() -> None:
            for file in files:
                ours.model_input(read_image(str(file), "BGR"), "BGR")

        def draw_and_write() -> None:
            for file, image, instances in zip(files, pixels, found, strict=True):
                write(file, draw_instances(image, instances, metadata, THRESHOLD))

        def visualize(image: object, instances: Instances) -> object:
            visualizer = Visualizer(image[:, :, ::-1], metadata)
            kept = instances[instances.scores >= THRESHOLD]
            return visualizer.draw_instance_predictions(kept).get_image()[:, :, ::-1]

        def plain_loop() -> None:
            for file in files:
                image = read_image(str(file), "BGR")
                write(file, visualize(image, plain(image)["instances"].to("cpu")))

        rows = {
            "the network alone, with its post-processing": lambda: seconds(network),
            "reading and resizing alone": lambda: seconds(read_and_resize),
            "drawing and writing alone": lambda: seconds(draw_and_write),
            "the command": lambda: command(weights, folder, str(output)),
            "Detectron2's plain loop": lambda: seconds(plain_loop),
        }
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(args.repeats):
            for name, measure in rows.items():
                times[name].append(measure())

    print(f"{machine(default_device())}\n{args.images} images, {statistics.mean(drawn):.0f} boxes")
    medians = {name: statistics.median(x) for name, x in times.items()}
    parts = sum(list(medians.values())[:3])
    table = [[name, f"{args.images / x:.1f}", f"{x / parts:.2f}"] for name, x in medians.items()]
    print(tabulate(table, ["", "images a second", "time, of the sum of the parts"]))


if __name__ == "__main__":
    main()
