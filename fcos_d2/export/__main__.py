"""Export a trained FCOS to one file that runs without PyTorch.

    python -m fcos_d2.export --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml \\
        --output model.onnx MODEL.WEIGHTS output/model_final.pth

The file takes pixels and gives boxes, scores and classes. It is compared with PyTorch before it is
kept. docs/export.md says how to run it.
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from ..checkpoint import AtomicCheckpointer
from ..command_line import config_parser, exit_on_error
from ..config import load_cfg
from ..data import category_ids, class_names
from ..modeling import FCOS
from ..zoo import check_fits
from .onnx import LIMIT, ExportError, check_model, to_onnx


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = config_parser(__doc__, prog="python -m fcos_d2.export")
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
    return parser.parse_intermixed_args(argv)


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
    with exit_on_error(AssertionError, ExportError, ImportError):
        cfg = load_cfg(args.config_file, args.opts)
        model, names, ids = load_model(cfg)
        difference = to_onnx(
            model,
            args.output,
            raw=args.raw,
            input_type=args.input_type,
            opset=args.opset,
            class_names=names,
            category_ids=ids,
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
        )
    print(f"Exported to {args.output}")
    print(f"Class names: {', '.join(names) if names else 'none'}")
    print(f"Largest difference to PyTorch in ONNX Runtime: {difference:.1e} (limit {LIMIT})")


if __name__ == "__main__":
    main()
