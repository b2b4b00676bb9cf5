#!/usr/bin/env python
"""Best possible recall and ambiguous samples of a config on a data set (1904.01355, section 4.1).

    python tools/analyze_assignment.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml \\
        --coco-json instances_val2017.json --plot plots --json statistics.json \\
        MODEL.FCOS.CENTER_SAMPLING_RADIUS 0.0

Needs only sizes and boxes, no images or weights. fcos_d2/analysis/assignment.py defines the numbers
and quotes the paper's.
"""

import argparse
import json
from pathlib import Path

from fcos_d2.analysis import analyze_assignment
from fcos_d2.analysis.assignment_charts import save_assignment_charts
from fcos_d2.command_line import config_parser, exit_on_error
from fcos_d2.config import load_cfg
from fcos_d2.data import load_coco_json, load_dataset


def parse_args() -> argparse.Namespace:
    parser = config_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--dataset", metavar="NAME", help="registered with Detectron2 or in DATASETS.CUSTOM"
    )
    source.add_argument("--coco-json", metavar="FILE", help="an annotation file in COCO's format")
    parser.add_argument(
        "--include-crowd", action="store_true", help="keep the boxes that are marked iscrowd"
    )
    parser.add_argument("--plot", metavar="DIR", type=Path, help="write plots as PNG files")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers")
    return parser.parse_intermixed_args()


def main() -> None:
    args = parse_args()
    with exit_on_error():
        cfg = load_cfg(args.config_file, args.opts)
        if args.dataset is not None:
            records = load_dataset(cfg, args.dataset)
        else:
            records = load_coco_json(args.coco_json)
        statistics = analyze_assignment(
            cfg, records, include_crowd=args.include_crowd, progress=True
        )
    print(statistics.table())
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(statistics.to_dict(), indent=2) + "\n")
    if args.plot is not None:
        for file in save_assignment_charts(statistics, args.plot):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
