"""A page in the browser that shows what a detector finds in an image, a camera or a video.

    fcos app --weights output/model_final.pth
    fcos app --weights model.onnx
    fcos app --model fcos_R_50_FPN_1x --port 8080

The page is for this machine alone; --host 0.0.0.0 opens it to all that reach the machine, without
a password. It needs Gradio: pip install 'fcos_d2[app]'.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..command_line import config_parser, exit_on_error
from ..engine.stopping import exit_code
from ..inference import Predictor
from ..inference.model_options import add_model_options, chosen_cfg
from ..inference.onnx_predictor import OnnxPredictor
from .detector import Detector


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(argv)
    with exit_on_error(), tempfile.TemporaryDirectory(prefix="fcos_app_") as folder:
        # Gradio reads these when it is imported: where it keeps what is uploaded and shown, and
        # what it tells its makers and the browser's own storage, which is nothing.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "gradio"))
        os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
        try:
            from .page import make_page, serve
        except ImportError as error:
            raise ValueError(
                f"The page needs Gradio ({error}): pip install 'fcos_d2[app]'"
            ) from error
        page = make_page(_detector(args), folder)
        signal.signal(signal.SIGTERM, _terminate)
        serve(page, args.host, args.port)


def _terminate(*_: object) -> None:
    """Leave as after an error, so that the folder is removed, whatever signals follow."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(exit_code(signal.SIGTERM))


def _parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__, config_required=False, prog="fcos app")
    add_model_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address that it listens on (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="its port (7860)")
    return parser


def _detector(args: argparse.Namespace) -> Detector:
    if not (args.weights and args.weights.lower().endswith(".onnx")):
        cfg = chosen_cfg(args)
        return Detector(Predictor(cfg, batch_size=1), _short(cfg.MODEL.WEIGHTS))
    if args.model or args.config_file or args.opts or args.device:
        raise ValueError("An ONNX file has its settings in itself: leave out the other options")
    return Detector(OnnxPredictor(args.weights), _short(args.weights))


def _short(weights: str) -> str:
    """Without the folder, which is nobody's business on the page."""
    return weights if "://" in weights else Path(weights).name
