"""Detect objects in images and videos with a trained model, and draw them.

    fcos predict --model fcos_R_50_FPN_1x --input photo.jpg --output detections
    fcos predict --weights output/model_final.pth --input photos --output detections
    fcos predict --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml \\
        --weights fcos_R_50.pth --input 'photos/*.jpg' --output detections --json
    fcos predict --weights model.pth --input film.mp4 --output detections
    fcos predict --weights model.pth --input 0 --output camera    (Ctrl-C ends it)
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.utils import comm
from tqdm import tqdm

from ..command_line import config_parser
from ..engine import launch, leave_group
from ..engine.stopping import exit_code
from .background import in_background
from .drawing import draw_instances
from .inputs import find_source, is_live, read_images
from .model_options import add_model_options, chosen_cfg
from .predictor import Predictor
from .results import ResultFile, ids_of_annotations
from .writers import ImageWriter, VideoWriter


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    if (args.resume or args.annotations) and not args.json:
        parser.error("--resume and --annotations are about results.json: add --json")
    if not (args.json or args.pictures):
        parser.error("--no-pictures without --json leaves nothing to write")
    _take_keys_from_input(args)
    try:
        args.source, args.skipped = find_source(args.input)
    except ValueError as error:
        raise SystemExit(f"Nothing was detected. {error}") from error
    launch(run, args)


def run(args: argparse.Namespace) -> None:
    """What each process does: it detects in every N-th image, if there are N processes."""
    rank, world, source = comm.get_rank(), comm.get_world_size(), args.source
    are_images, live = isinstance(source, list), is_live(source)
    read: list[str] = []  # images, and those that cannot be read, which have no detections
    failed: list[str] = []
    try:
        cfg = chosen_cfg(args)
        if not are_images:
            _check_video_options(args, world)
        batch_size = 1 if live else args.batch_size  # live frames do not wait for others
        predictor = Predictor(cfg, batch_size=batch_size)
        threshold = _threshold(args.threshold, predictor.metadata.get("thing_classes", None))
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        results = ResultFile(output, predictor.metadata, args.resume) if args.json else None
        done = results.done if results else set()
        ids = None
        if args.annotations:  # results.json has the images of earlier runs, too
            ids = ids_of_annotations(args.annotations, list(dict.fromkeys([*source, *done])))
        if are_images:
            files = [file for file in source if file not in done][rank::world]
            writer, total = ImageWriter(output, source), len(files)
            images = read_images(files, read, failed, batch_size)
            detected = predictor.pairs(images, "BGR", ahead=batch_size)
        else:
            writer = VideoWriter(output, source)
            detected, total = predictor.video(source), writer.total
    except (ValueError, OSError) as error:
        raise SystemExit(f"Nothing was detected. {error}") from error
    if args.skipped and rank == 0:
        skipped = f"Skipped {len(args.skipped)} file(s), whose names do not end as images do:"
        print(skipped, *args.skipped[:5])
    if done and rank == 0:
        print(f"{len(done)} images were done before")

    def write(numbered: tuple[int, tuple[np.ndarray, dict]]) -> None:
        number, (image, outputs) = numbered
        name = read[number] if read else number
        instances = outputs["instances"].to("cpu")
        if args.pictures:
            writer.write(name, draw_instances(image, instances, predictor.metadata, threshold))
        if results:
            results.write(name, instances)

    count, begin = 0, time.perf_counter()
    written = in_background(write, enumerate(detected), ahead=batch_size)
    try:
        with contextlib.closing(written):
            for _ in tqdm(written, total=total, unit=" images", disable=rank > 0):
                count += 1
        if not count and not are_images:
            raise OSError(f"No frame of {source} can be read")
        comm.synchronize()
        if results and rank == 0:
            results.merge(ids, source if are_images else ())
    except KeyboardInterrupt:
        print("Stopped; what was detected so far is kept.")
        if results and not are_images:
            results.merge()
        elif results:
            print(f"It is in {results.lines}; --resume goes on.")
        if world > 1:  # the others would wait for this one
            raise
        if not live:  # Ctrl-C is how a camera ends
            sys.exit(exit_code(signal.SIGINT))
    except OSError as error:  # such as a full disk
        can_go_on = results and are_images
        goes_on = f". What is done is in {results.lines}; --resume goes on" if can_go_on else ""
        raise SystemExit(f"Stopped. {error}{goes_on}") from error
    finally:
        writer.close()
        if results:
            results.close()
    seconds = time.perf_counter() - begin
    counts = comm.gather((count, failed))
    if rank == 0:
        count, failed = sum(n for n, _ in counts), [x for _, names in counts for x in names]
        print(f"{count} images in {seconds:.1f} s, {count / seconds:.1f} a second, to {output}.")
        if not (are_images or live) and count < 0.99 * (total or 0):  # the number is an estimate
            print(f"{source} should have {total} frames; it may be cut off or damaged.")
        if failed:
            print(f"{len(failed)} file(s) could not be read:", *failed, sep="\n  ")
            leave_group()
            sys.exit(1)


def _check_video_options(args: argparse.Namespace, processes: int) -> None:
    if args.annotations:
        raise ValueError("--annotations is for images, not for a video")
    if args.resume:
        raise ValueError(
            "--resume is for images. A video starts anew: remove results.0.jsonl of the run that "
            "was stopped, and leave out --resume"
        )
    if processes > 1:
        raise ValueError("A video is for one process: its frames come one after the other")


def _parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__, config_required=False, prog="fcos predict")
    add_model_options(parser)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="images, folders, patterns; or a video, or a camera's number",
    )
    parser.add_argument("--output", required=True, help="the folder for what is drawn")
    parser.add_argument(
        "--json",
        action="store_true",
        help="also write results.json, a COCO data set of the images, with all detections as "
        "annotations that have a score",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="a COCO file that has the images: results.json then has its image ids, as a list of "
        "results for COCO's evaluation",
    )
    parser.add_argument(
        "--resume", action="store_true", help="with --json: go on where an earlier run was stopped"
    )
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="draw nothing")
    parser.add_argument(
        "--threshold",
        default="0.4",
        metavar="SCORE_OR_FILE",
        help="the least score that is drawn (0.4), or a report's thresholds.json. results.json has "
        "all that the detector gives, from MODEL.FCOS.SCORE_THRESH_TEST on",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the images, also on CPU (1); torchrun and srun start their own",
    )
    # One process may be done long before another. A dead one is noticed at once.
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto", timeout=24 * 60)
    parser.add_argument("--batch-size", type=int, default=8, help="images that run together (8)")
    return parser


def _take_keys_from_input(args: argparse.Namespace) -> None:
    """Give changes of the config that follow --input, which takes all that comes, to the others."""
    for i, word in enumerate(args.input):
        if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", word) and not os.path.exists(word):
            args.input, args.opts = args.input[:i], [*args.opts, *args.input[i:]]
            return


def _threshold(text: str, class_names: Sequence[str] | None) -> float | list[float]:
    """A score, or one for each class from a report's file.

    Raises:
        ValueError: for neither a score from 0 to 1 nor a file, and for a file that lacks a class.
    """
    with contextlib.suppress(ValueError):
        score = float(text)
        if 0 <= score <= 1:
            return score
        text = f"{text}, which is not from 0 to 1"
    if not os.path.isfile(text):
        raise ValueError(f"--threshold {text} is neither a score nor a file")
    try:
        of_classes = json.loads(Path(text).read_text())["classes"]
        return [float(of_classes[name]) for name in class_names]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--threshold {text} has no scores of the classes {class_names}, which are those of "
            f"the weights: {error!r}. A report writes such a file, thresholds.json"
        ) from error
