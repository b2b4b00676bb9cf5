#!/usr/bin/env python
"""Pictures of what an FCOS sees in an image, or of its scores on a data set.

    python tools/visualize_fcos.py --config-file output/config.yaml --input photo.jpg \\
        --output pictures MODEL.WEIGHTS output/model_final.pth
    python tools/visualize_fcos.py --config-file output/config.yaml --dataset my_val \\
        --image-id 17 --output pictures MODEL.WEIGHTS output/model_final.pth
    python tools/visualize_fcos.py --config-file output/config.yaml --dataset my_val \\
        --output pictures MODEL.WEIGHTS output/model_final.pth

Of an image: quality.png and classes.png, heat maps of each level; detections.png, where each
detection comes from; with --dataset and --image-id also positives.png, which location would learn
which box. Of a data set: scores.png, scores against IoU without and with quality.
"""

import argparse
from pathlib import Path

from detectron2.config import CfgNode
from matplotlib.figure import Figure
from tabulate import tabulate

from fcos_d2 import Predictor, load_cfg
from fcos_d2.analysis import inspect_image, locate_positives, scores_and_ious
from fcos_d2.analysis.assignment import check_is_fcos
from fcos_d2.analysis.box_figures import origins_figure, positives_figure
from fcos_d2.analysis.charts import save_figures
from fcos_d2.analysis.heat_maps import class_figure, quality_figure
from fcos_d2.analysis.inspection import Inspection
from fcos_d2.analysis.score_quality import read_record_image, scores_figure
from fcos_d2.command_line import config_parser, exit_on_error
from fcos_d2.data import check_names_of_detector, check_num_classes, find_record, load_dataset
from fcos_d2.data.image_files import read_image
from fcos_d2.modeling.head import WITHOUT_FACTOR


def parse_args() -> argparse.Namespace:
    parser = config_parser(__doc__)
    parser.add_argument("--input", metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--dataset", metavar="NAME", help="registered with Detectron2 or in DATASETS.CUSTOM"
    )
    parser.add_argument("--image-id", metavar="N", help="the image of --dataset with this image_id")
    parser.add_argument(
        "--output", required=True, metavar="DIR", type=Path, help="the folder for the pictures"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.4, help="the least score that is drawn (0.4)"
    )
    parser.add_argument(
        "--max-images", type=int, metavar="N", help="of a data set only the first N images"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_args()
    with exit_on_error():
        _check(args)
        cfg = load_cfg(args.config_file, args.opts)
        check_is_fcos(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise ValueError("The config names no weights: add MODEL.WEIGHTS FILE at the end")
        if not args.dataset:
            _draw_image(args, cfg, Predictor(cfg), None)
            return
        records = load_dataset(cfg, args.dataset)
        check_num_classes(cfg, args.dataset)
        record = find_record(records, args.image_id) if args.image_id else None
        predictor = Predictor(cfg)
        check_names_of_detector(predictor.metadata.get("thing_classes", None), args.dataset)
        if record is None:
            _draw_scores(args, cfg, predictor, records[: args.max_images])
        else:
            _draw_image(args, cfg, predictor, record)


def _check(args: argparse.Namespace) -> None:
    """Raise a ValueError for options that do not go together."""
    if args.image_id and not args.dataset:
        raise ValueError("--image-id is of a data set: add --dataset NAME")
    if not args.input and not args.dataset:
        raise ValueError(
            "Nothing to draw. Add --input IMAGE for an image, --dataset NAME --image-id N for one "
            "with its ground truth, or --dataset NAME for the scores on a data set"
        )
    if args.input and args.dataset and not args.image_id:
        raise ValueError(
            "--input with --dataset needs --image-id N, the image's number there. Without --input, "
            "--dataset alone draws the scores on the data set"
        )
    if args.max_images is not None and args.max_images < 1:
        raise ValueError(f"--max-images must be at least 1, got {args.max_images}")


def _draw_image(
    args: argparse.Namespace, cfg: CfgNode, predictor: Predictor, record: dict | None
) -> None:
    file = args.input or record["file_name"]
    image = read_image(file, "BGR") if record is None else read_record_image(record, file)
    inspection = inspect_image(predictor, image)
    print(_table(inspection, args.threshold))
    quality = cfg.MODEL.FCOS.QUALITY
    figures = {
        "classes": class_figure(inspection),
        "detections": origins_figure(inspection, args.threshold),
    }
    if inspection.quality is None:
        print(f"No quality.png: MODEL.FCOS.QUALITY is {quality!r}: class probabilities are all.")
    else:
        figures["quality"] = quality_figure(inspection, quality)
    if record is not None and predictor.model.assigner.sees_predictions:
        chooses = f"MODEL.FCOS.ASSIGNMENT {cfg.MODEL.FCOS.ASSIGNMENT!r} chooses in training alone"
        print(f"No positives.png: {chooses}, by what the model then predicts.")
    elif record is not None:
        positives = locate_positives(cfg, predictor.model, record)
        figures["positives"] = positives_figure(inspection, positives)
    _save(figures, args.output)


def _draw_scores(
    args: argparse.Namespace, cfg: CfgNode, predictor: Predictor, records: list[dict]
) -> None:
    points = scores_and_ious(predictor, cfg, records, progress=True)
    quality, fusion = cfg.MODEL.FCOS.QUALITY, cfg.MODEL.FCOS.SCORE_FUSION
    if quality in WITHOUT_FACTOR:
        print(f"MODEL.FCOS.QUALITY is {quality!r}: scores.png shows class probability alone.")
    _save({"scores": scores_figure(points, quality, fusion)}, args.output)


def _save(figures: dict[str, Figure], folder: Path) -> None:
    for file in save_figures(figures, folder):
        print(f"wrote {file}")


def _table(inspection: Inspection, threshold: float) -> str:
    """The detections as text, best first, in pixels of the image."""
    detections = inspection.detections
    detections = detections[detections.scores >= threshold]
    levels = list(zip(inspection.level_names, inspection.levels.strides, strict=True))
    columns = [[inspection.class_names[i] for i in detections.pred_classes]]
    for numbers in (detections.scores, detections.class_probability, detections.quality):
        columns.append([f"{x:.2f}" for x in numbers])
    columns.append(["{} ({})".format(*levels[i]) for i in detections.level])
    for points in (detections.locations, detections.ltrb, detections.pred_boxes.tensor):
        columns.append([" ".join(f"{x:.1f}" for x in point) for point in points.tolist()])
    header = (
        "class", "score", "class prob.", "quality", "level (stride)", "location",
        "left top right bottom", "box",
    )  # fmt: skip
    return tabulate(zip(*columns, strict=True), header, disable_numparse=True)


if __name__ == "__main__":
    main()
