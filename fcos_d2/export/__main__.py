"""Export a trained FCOS to one file that runs without PyTorch.

    python -m fcos_d2.export --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml \\
        --output model.onnx MODEL.WEIGHTS output/model_final.pth

The file takes pixels and gives boxes, scores and classes. It is compared with PyTorch before it is
kept. docs/export.md says how to run it.
"""

import argparse
import sys

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from ..checkpoint import AtomicCheckpointer
from ..config import load_cfg
from ..data import register_custom_datasets
from ..modeling import FCOS
from .onnx import LIMIT, ExportError, to_onnx


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fcos_d2.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="(default: onnx)")
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
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="changes to the config, such as MODEL.WEIGHTS FILE",
    )
    return parser.parse_args()


def load_model(cfg: CfgNode) -> FCOS:
    """The detector of a config on CPU, with its weights.

    Raises:
        ValueError: for another detector than FCOS, and for weights that do not fill the model.
    """
    if cfg.MODEL.META_ARCHITECTURE != "FCOS":
        raise ValueError(
            f"Only META_ARCHITECTURE 'FCOS' can be exported, not {cfg.MODEL.META_ARCHITECTURE!r}. "
            "For other detectors use Detectron2's tools/deploy/export_model.py"
        )
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("Name the weights to export: MODEL.WEIGHTS FILE")
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    checkpointer = AtomicCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    checkpointer.check_complete()
    return model


def class_names(cfg: CfgNode) -> list[str] | None:
    """Of the first test set. None where it is not known, or where its file is not at hand.

    Raises:
        ValueError: if they are not as many as the model's classes.
    """
    register_custom_datasets(cfg)
    if not cfg.DATASETS.TEST or cfg.DATASETS.TEST[0] not in DatasetCatalog:
        return None
    name = cfg.DATASETS.TEST[0]
    if MetadataCatalog.get(name).get("thing_classes", None) is None:  # they are in the file alone
        try:
            DatasetCatalog.get(name)
        except FileNotFoundError:
            return None
    names = MetadataCatalog.get(name).get("thing_classes", None)
    if names is not None and len(names) != cfg.MODEL.FCOS.NUM_CLASSES:
        raise ValueError(
            f"The model has {cfg.MODEL.FCOS.NUM_CLASSES} classes, but {name!r}, whose class names "
            f"go into the file, has {len(names)}. Set DATASETS.TEST to the data set of the model, "
            'or to "()" for a file without names'
        )
    return names


def main() -> None:
    args = parse_args()
    try:
        cfg = load_cfg(args.config_file, args.opts)
        names = class_names(cfg)
        difference = to_onnx(
            load_model(cfg),
            args.output,
            raw=args.raw,
            input_type=args.input_type,
            opset=args.opset,
            class_names=names,
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
        )
    except (AssertionError, ExportError, ImportError, KeyError, OSError, ValueError) as error:
        # Detectron2 refuses files that do not exist by AssertionError.
        sys.exit(f"error: {error}")
    print(f"Exported to {args.output}")
    print(f"Class names: {', '.join(names) if names else 'none'}")
    print(f"Largest difference to PyTorch in ONNX Runtime: {difference:.1e} (limit {LIMIT})")


if __name__ == "__main__":
    main()
