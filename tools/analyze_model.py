#!/usr/bin/env python
"""Compare the parameters, multiply-adds and outputs of an FCOS config with RetinaNet's.

    python tools/analyze_model.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml

RetinaNet is Detectron2's, with the same ResNet-FPN, classes and input. fcos_d2/analysis/model.py
says what is counted. Runs on CPU, without weights.
"""

import argparse
import sys

from fcos_d2.analysis import compare_with_retinanet, comparison_table
from fcos_d2.config import load_cfg


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1216),
        metavar=("H", "W"),
        help="height and width of the image in pixels (default: 800 1216)",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_cfg(args.config_file, args.opts)
    try:
        fcos, retinanet = compare_with_retinanet(cfg, *args.size)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(comparison_table(fcos, retinanet))


if __name__ == "__main__":
    main()
