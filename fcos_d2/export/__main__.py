"""Export a trained FCOS to one file that runs without PyTorch.

    fcos export --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml \\
        --output model.onnx MODEL.WEIGHTS output/model_final.pth

The file takes pixels and gives boxes, scores and classes. It is compared with PyTorch before it is
kept. docs/export.md says how to run it. With --int8 its convolutions have 8 bits, for CPUs:

    fcos export --config-file output/config.yaml --output model.onnx --int8 \\
        MODEL.WEIGHTS output/model_final.pth
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from ..checkpoint import AtomicCheckpointer
from ..command_line import config_parser, exit_on_error
from ..config import load_cfg
from ..data import category_ids, class_names, load_dataset
from ..data.image_files import images_in
from ..modeling import FCOS
from ..zoo import check_fits
from .int8 import LEAST_AGREEMENT, quantize
from .onnx import LIMIT, ExportError, check_model, to_onnx


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = config_parser(__doc__, prog="fcos export")
    parser.add_argument("--output", required=True, metavar="FILE", help="such as model.onnx")
    parser.add_argument(
        "--raw", action="store_true", help="the maps of the head in place of detections"
    )
    parser.add_argument(
        "--input-type",
        choices=["float32", "uint8"],
        default="float32",
        help="of the pixels, which are in [0, 255] in either (default: float32)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="of ONNX (default: 18; with deformable convolutions 19)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="convolutions of 8 bits, calibrated with images of DATASETS.TRAIN",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="with --int8: a folder of images or a registered data set, in place of DATASETS.TRAIN",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        metavar="N",
        help="with --int8: how many images of the data to calibrate with, evenly taken (200)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.int8 and args.raw:
        parser.error("--int8 compares detections, which a --raw file does not give: choose one")
    if args.calibrate and not args.int8:
        parser.error("--calibrate is for --int8: add it")
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    return args


def calibration_images(cfg: CfgNode, data: str | None, most: int) -> list[str]:
    """Evenly taken image files of a folder, of a data set, or of those of DATASETS.TRAIN.

    Raises:
        ValueError: if there is none.
    """
    if data is not None and os.path.isdir(data):
        files = images_in(data)
    else:
        names = cfg.DATASETS.TRAIN if data is None else [data]
        files = [x["file_name"] for name in names for x in load_dataset(cfg, name)]
    if not files:
        where = "DATASETS.TRAIN" if data is None else data
        raise ValueError(f"{where} has no image: name a folder of images with --calibrate")
    return [files[i * len(files) // most] for i in range(most)] if len(files) > most else files


def load_model(cfg: CfgNode) -> tuple[FCOS, list[str] | None, list[int] | None]:
    """The detector of a config on CPU, names and category ids of its classes from weights or data.

    Raises:
        ValueError: for another detector than FCOS, for weights that do not fill the model, and for
            other numbers of names than of classes.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("Name the weights to export: MODEL.WEIGHTS FILE")
    check_fits(cfg)
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    check_model(model)
    checkpointer = AtomicCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    checkpointer.check_complete()
    names = checkpointer.class_names or _names_of_data(cfg)
    if names is not None and len(names) != cfg.MODEL.FCOS.NUM_CLASSES:
        raise ValueError(
            f"The model has {cfg.MODEL.FCOS.NUM_CLASSES} classes, but these {len(names)} names "
            f"would go into the file: {names}. Set DATASETS.TRAIN and DATASETS.TEST to the data "
            'sets of the model, or to "()" for a file without names'
        )
    ids = checkpointer.category_ids
    if ids is None and names == class_names(cfg):
        ids = category_ids(cfg)
    return model, names, ids


def _names_of_data(cfg: CfgNode) -> list[str] | None:
    """Of the first data set, where its file is at hand."""
    with suppress(OSError):
        for name in filter(DatasetCatalog.__contains__, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
            if class_names(cfg) is None:  # they are in the file alone
                DatasetCatalog.get(name)
    return class_names(cfg)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # Detectron2 refuses weights that do not exist by AssertionError.
    with exit_on_error(AssertionError, ExportError, ImportError), ExitStack() as stack:
        cfg = load_cfg(args.config_file, args.opts)
        # Before the export: what is missing is said at once.
        images = calibration_images(cfg, args.calibrate, args.images) if args.int8 else []
        model, names, ids = load_model(cfg)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        exact = os.path.join(folder, "float32.onnx") if args.int8 else args.output
        difference = to_onnx(
            model,
            exact,
            raw=args.raw,
            input_type=args.input_type,
            opset=args.opset,
            class_names=names,
            category_ids=ids,
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
        )
        if args.int8:
            print(f"Calibrating with {len(images)} images", flush=True)
            check = quantize(exact, args.output, images)
    print(f"Exported to {args.output}")
    print(f"Class names: {', '.join(names) if names else 'none'}")
    of_what = " of float32" if args.int8 else ""
    print(
        f"Largest difference{of_what} to PyTorch in ONNX Runtime: {difference:.1e} (limit {LIMIT})"
    )
    if args.int8:
        print(
            f"INT8 beside float32, on {check.images} of the images: {check.speed:.1f} times as "
            f"fast; AP {check.agreement:.1f} where float32's better detections are the truth "
            f"(limit {LEAST_AGREEMENT:g})"
        )


if __name__ == "__main__":
    main()
