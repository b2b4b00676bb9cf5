"""Detect objects in images and videos with a trained model, and draw them.

    python -m fcos_d2.predict --model fcos_R_50_FPN_1x --input photo.jpg --output detections
    python -m fcos_d2.predict --weights output/model_final.pth --input photos --output detections
    python -m fcos_d2.predict --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml \\
        --weights fcos_R_50.pth --input 'photos/*.jpg' --output detections --json
    python -m fcos_d2.predict --weights model.pth --input film.mp4 --output detections
    python -m fcos_d2.predict --weights model.pth --input 0 --output camera    (Ctrl-C ends it)
"""

import argparse
import contextlib
import glob
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..checkpoint import read_checkpoint, replacing
from ..command_line import config_parser
from ..config import load_cfg
from ..data.image_files import IMAGE_SUFFIXES, images_in, read_image
from ..zoo import DEFAULT, PUBLISHED, find
from .drawing import draw_instances
from .predictor import Predictor

_VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(argv)
    try:
        cfg = _config(args)
        source = _source(args.input)
        # The frames of a camera do not wait for others.
        batch_size = 1 if isinstance(source, int) else args.batch_size
        predictor = Predictor(cfg, batch_size=batch_size)
        threshold = _threshold(args.threshold, predictor.metadata.get("thing_classes", None))
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        read: list[str] = []
        failed: list[str] = []
        if isinstance(source, list):
            writer = _ImageWriter(output, source)
            detected = predictor.pairs(_readable(source, read, failed), "BGR")
        else:
            writer = _VideoWriter(output, source)
            detected = predictor.video(source)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Nothing was detected. {error}") from error

    coco_results, count, begin = [], 0, time.perf_counter()
    try:
        for image, outputs in tqdm(detected, total=writer.total, unit=" images"):
            name = read[count] if read else count
            count += 1
            instances = outputs["instances"].to("cpu")
            writer.write(name, draw_instances(image, instances, predictor.metadata, threshold))
            if args.json:
                coco_results += _as_coco_results(name, instances, predictor.metadata)
    except KeyboardInterrupt:
        print("Stopped; what was detected so far is kept.")
    finally:
        writer.close()
        if args.json:
            with replacing(str(output / "results.json"), "w") as file:
                json.dump(coco_results, file)
    seconds = time.perf_counter() - begin
    print(f"{count} images in {seconds:.1f} s, {count / seconds:.1f} a second, drawn in {output}.")
    if failed:
        print(f"{len(failed)} file(s) could not be read:", *failed, sep="\n  ")
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__, config_required=False, prog="python -m fcos_d2.predict")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a published checkpoint, which is fetched: its name, address, or the config it has; "
        f"{DEFAULT} if neither --weights nor --config-file is given (docs/model_zoo.md)",
    )
    parser.add_argument(
        "--weights", help="MODEL.WEIGHTS; no --config-file is needed if they carry theirs"
    )
    parser.add_argument(
        "--input", required=True, help="an image, folder, pattern, video, or a camera's number"
    )
    parser.add_argument("--output", required=True, help="the folder for what is drawn")
    parser.add_argument(
        "--json", action="store_true", help="also write results.json in COCO's result format"
    )
    parser.add_argument(
        "--threshold",
        default="0.4",
        metavar="SCORE_OR_FILE",
        help="the least score that is drawn (0.4), or a report's thresholds.json",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images that run together (8)")
    parser.add_argument("--device", help='for example "cuda:1" or "cpu"; a GPU if there is one')
    return parser


def _config(args: argparse.Namespace) -> CfgNode:
    if args.model and (args.config_file or args.weights):
        raise ValueError("--model comes with its config and weights: leave out the others")
    if args.model or not (args.config_file or args.weights):
        row = find(args.model or DEFAULT)
        print(f"The model is {row.address} (AP {row.ap}, {row.licence})")
        if not args.model:
            print("Choose another one with --model (docs/model_zoo.md), or --weights:")
            print(*(f"  {row.address} (AP {row.ap})" for row in PUBLISHED.values()), sep="\n")
        cfg = row.cfg()
        cfg.merge_from_list(args.opts)
    elif args.config_file:
        cfg = load_cfg(args.config_file, args.opts)
    else:
        text = read_checkpoint(PathManager.get_local_path(args.weights)).get("config")
        if not isinstance(text, str):
            raise ValueError(f"{args.weights} does not carry its config: add --config-file")
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            cfg = load_cfg(file.name, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("The config names no MODEL.WEIGHTS: add --weights")
    # The config may name the GPU of another machine.
    available = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.DEVICE = str(torch.device(args.device or available))
    return cfg


def _threshold(text: str, class_names: Sequence[str] | None) -> float | list[float]:
    """A score, or one for each class from a report's file.

    Raises:
        ValueError: for neither a number nor a file, and for a file that lacks a class.
    """
    with contextlib.suppress(ValueError):
        return float(text)
    if not os.path.isfile(text):
        raise ValueError(f"--threshold {text!r} is neither a number nor a file")
    try:
        of_classes = json.loads(Path(text).read_text())["classes"]
        return [float(of_classes[name]) for name in class_names]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--threshold {text} has no scores of the classes {class_names}, which are those of "
            f"the weights: {error!r}. A report writes such a file, thresholds.json"
        ) from error


def _source(name: str) -> list[str] | str | int:
    """Image files, a video, or the number of a camera.

    Raises:
        ValueError: if there is nothing of this name.
    """
    if os.path.isdir(name):
        files = images_in(name)
    elif os.path.isfile(name):
        return name if name.lower().endswith(_VIDEO_SUFFIXES) else [name]
    elif name.isdecimal():
        return int(name)
    elif "://" in name:  # a stream
        return name
    else:
        files = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    if not files:
        raise ValueError(
            f"There is no image at --input {name!r}. It takes a file, a folder with files that end "
            f"with {', '.join(IMAGE_SUFFIXES)}, a pattern in quotes, a video or a camera's number"
        )
    return files


def _readable(files: Sequence[str], read: list[str], failed: list[str]) -> Iterator[np.ndarray]:
    """The images, BGR, of the files, which go into ``read`` or, with the reason, ``failed``."""
    for file in files:
        try:
            image = read_image(file, "BGR")
        except Exception as error:  # PIL raises many kinds
            failed.append(f"{file}: {error}")
        else:
            read.append(file)
            yield image


class _ImageWriter:
    """Writes pictures under their files' paths, relative to the folder that all share."""

    def __init__(self, output: Path, files: Sequence[str]):
        self.output, self.total = output, len(files)
        self.root = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])

    def write(self, file: str, picture: np.ndarray) -> None:
        target = self.output / os.path.relpath(os.path.abspath(file), self.root)
        if target.resolve() == Path(file).resolve():
            raise SystemExit(f"The picture would be written over {file}: choose another --output")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(target), picture):
            raise SystemExit(f"OpenCV cannot write {target}")

    def close(self) -> None:
        pass


class _VideoWriter:
    """Writes frames to an MP4 file."""

    def __init__(self, output: Path, source: str | int):
        name = f"camera_{source}" if isinstance(source, int) else Path(source).stem
        self.file = output / f"{name}.mp4"
        capture = cv2.VideoCapture(source)
        self.frames_a_second = capture.get(cv2.CAP_PROP_FPS) or 25
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = frames if frames > 0 else None
        capture.release()
        if not isinstance(source, int) and self.file.resolve() == Path(source).resolve():
            raise SystemExit(f"The video would be written over {source}: choose another --output")
        self.writer = cv2.VideoWriter()  # opened when the size of the frames is known

    def write(self, number: int, picture: np.ndarray) -> None:
        if not self.writer.isOpened():
            height, width = picture.shape[:2]
            code = cv2.VideoWriter_fourcc(*"mp4v")
            if not self.writer.open(str(self.file), code, self.frames_a_second, (width, height)):
                raise SystemExit(f"OpenCV cannot write the video {self.file}")
        self.writer.write(picture)

    def close(self) -> None:
        self.writer.release()


def _as_coco_results(name: str | int, instances: Instances, metadata: Metadata) -> list[dict]:
    """Detections in COCO's result format.

    ``image_id`` is the frame's number, or that in the file's name, as in COCO's, or else the file.
    ``category_id`` is the data set's if it is known, and else counts from 0.
    """
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
    category_ids = {number: category_id for category_id, number in numbers.items()}
    names = metadata.get("thing_classes", None)
    stem = Path(str(name)).stem
    results = instances_to_coco_json(instances, int(stem) if stem.isdecimal() else name)
    for result in results:
        number = result["category_id"]
        result["category_id"] = category_ids.get(number, number)
        if names:
            result["category_name"] = names[number]
    return results
