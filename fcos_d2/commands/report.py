"""A page on a run: how good it is, where it fails, and which score threshold to take.

    fcos report --config-file output/config.yaml
    fcos report --config-file output/config.yaml --compare other_run third_run
    fcos report --config-file output/config.yaml --eval-only \\
        MODEL.WEIGHTS output/model_best.pth

It is made of the detections that the last evaluation left in OUTPUT_DIR; with --eval-only the
weights are evaluated first. The page is OUTPUT_DIR/report/index.html.
"""

from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from ..command_line import config_parser, exit_on_error
from ..config import load_cfg
from ..data import check_test_sets
from ..engine import coco_evaluator, evaluate
from ..report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = config_parser(__doc__, prog="fcos report")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST first"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="folders of other runs"
    )
    parser.add_argument("--output", metavar="DIR", help="in place of OUTPUT_DIR/report")
    args = parser.parse_intermixed_args(argv)
    with exit_on_error():
        cfg = load_cfg(args.config_file, args.opts)
        if not len(cfg.DATASETS.TEST):
            raise ValueError("The config names no data set to report on: add DATASETS.TEST")
        if args.eval_only:
            setup_logger(name="fcos_d2")
            setup_logger()
            check_test_sets(cfg)
            # Those of PASCAL VOC keep no detections.
            evaluate(cfg, evaluators=[coco_evaluator(cfg, name) for name in cfg.DATASETS.TEST])
        for page in write_report(cfg, args.output, args.compare):
            print(f"wrote {page}")
