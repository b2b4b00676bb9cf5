"""The options that name a detector, of the commands that run one."""

import argparse
import tempfile

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..checkpoint import read_checkpoint
from ..config import load_cfg
from ..zoo import DEFAULT, PUBLISHED, find


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--weights`` and ``--device`` to a parser of ``config_parser``."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a published checkpoint, which is fetched: its name, address, or the config it has; "
        f"{DEFAULT} if neither --weights nor --config-file is given (docs/model_zoo.md)",
    )
    parser.add_argument(
        "--weights", help="MODEL.WEIGHTS; no --config-file is needed if they carry theirs"
    )
    parser.add_argument("--device", help='for example "cuda:1" or "cpu"; a GPU if there is one')


def chosen_cfg(args: argparse.Namespace) -> CfgNode:
    """The config, with MODEL.WEIGHTS and MODEL.DEVICE, of the detector that the options name.

    Raises:
        OSError: for a file that is not there.
        ValueError: for options that do not go together, weights that need a config, and a device
            of no kind that PyTorch knows.
    """
    if args.model and (args.config_file or args.weights):
        raise ValueError("--model comes with its config and weights: leave out the others")
    if args.model or not (args.config_file or args.weights):
        row = find(args.model or DEFAULT)
        print(f"The model is {row.address} (AP {row.ap}, {row.licence})")
        if not args.model:
            print("Choose another one with --model (docs/model_zoo.md), or --weights:")
            print(*(f"  {row.address} (AP {row.ap})" for row in PUBLISHED.values()), sep="\n")
        cfg = row.cfg()
        cfg.merge_from_list(args.opts)
    elif args.config_file:
        cfg = load_cfg(args.config_file, args.opts)
    else:
        text = read_checkpoint(PathManager.get_local_path(args.weights)).get("config")
        if not isinstance(text, str):
            raise ValueError(f"{args.weights} does not carry its config: add --config-file")
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            cfg = load_cfg(file.name, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("The config names no MODEL.WEIGHTS: add --weights")
    if args.device or "MODEL.DEVICE" not in args.opts:
        # The config may name the GPU of another machine.
        available = "cuda" if torch.cuda.is_available() else "cpu"
        cfg.MODEL.DEVICE = args.device or available
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f"There is no device {cfg.MODEL.DEVICE!r}: {error}") from error
    return cfg
