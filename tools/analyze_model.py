#!/usr/bin/env python
"""Compare the parameters, multiply-adds and outputs of an FCOS config with RetinaNet's.

    python tools/analyze_model.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml

RetinaNet is Detectron2's, with the same ResNet-FPN, classes and input. fcos_d2/analysis/model.py
says what is counted. Runs on CPU, without weights.
"""

from fcos_d2.analysis import compare_with_retinanet, comparison_table
from fcos_d2.command_line import config_parser, exit_on_error
from fcos_d2.config import load_cfg


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1216),
        metavar=("H", "W"),
        help="height and width of the image in pixels (default: 800 1216)",
    )
    args = parser.parse_intermixed_args()
    with exit_on_error():
        cfg = load_cfg(args.config_file, args.opts)
        print(comparison_table(*compare_with_retinanet(cfg, *args.size)))


if __name__ == "__main__":
    main()
