"""Turn a checkpoint of another FCOS implementation into one for this project.

    fcos convert adelaidet://FCOS_R_50_1x fcos.pth
    fcos convert FCOS_R_50_1x.pth fcos.pth --source adelaidet \\
        --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.yaml
    python train_net.py --config-file fcos.yaml --eval-only

The config gives what the checkpoint does not show: the backbone, and the numbers of classes and
convolutions. Keys and values at the end override it and the settings of the source. See
docs/coming_from.md.
"""

import argparse
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..checkpoint import read_checkpoint, replacing
from ..command_line import exit_on_error, find_config
from ..config import load_cfg
from ..config_files import get_config_file
from ..conversion import SOURCES, as_checkpoint, convert, dump
from ..zoo import find
from ..zoo.weights import local_file, raw_file


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_intermixed_args(argv)  # keys and values follow the options
    if is_published := "://" in args.src:
        with exit_on_error():
            row = find(args.src)
            local_file(row)  # fetches it
        args.src, args.source, args.opts = raw_file(row), row.source, [*row.opts, *args.opts]
        args.config_file = args.config_file or get_config_file(row.config)
    if not (args.source and args.config_file):
        parser.error("name --source and --config-file; only a published checkpoint has its own")
    dst = Path(args.dst)
    if dst.suffix != ".pth" or dst.resolve() == Path(args.src).resolve():
        raise SystemExit(f"DST must be a .pth file other than SRC, got {dst}")
    config_file = dst.with_suffix(".yaml")
    if config_file.resolve() == Path(args.config_file).resolve():
        raise SystemExit(
            f"The converted model's config would be written over --config-file {config_file}. "
            "Choose another name for DST"
        )
    dst.parent.mkdir(parents=True, exist_ok=True)
    with exit_on_error():
        cfg = load_cfg(args.config_file, args.opts)
        checkpoint = read_checkpoint(args.src, args.trust_pickle)
        state_dict, cfg = convert(checkpoint, args.source, cfg, args.opts)

    with replacing(str(dst), own=True) as file:
        torch.save(as_checkpoint(state_dict, cfg), file)
    cfg.MODEL.WEIGHTS = str(dst.resolve())
    with replacing(str(config_file), "w", own=True) as file:
        file.write(dump(cfg))
    print(f"Wrote {dst} and {config_file}.")
    if not is_published:
        _print_not_in_file(args.source, cfg)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcos convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src",
        help="checkpoint of the other implementation: .pth or .pkl, or the address of a published "
        "one, such as adelaidet://FCOS_R_50_1x",
    )
    parser.add_argument("dst", help="checkpoint to write, .pth; its config becomes a .yaml")
    parser.add_argument("--source", choices=list(SOURCES), help="the other implementation")
    parser.add_argument(
        "--config-file",
        type=find_config,
        help="a config with the same architecture",
    )
    parser.add_argument(
        "--trust-pickle", action="store_true", help="read files that can run code; see the docs"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser


def _print_not_in_file(source: str, cfg: CfgNode) -> None:
    keys = SOURCES[source].not_in_file
    if keys:
        print("Checkpoints of this source do not show these; check that they are right for yours:")
    for key in keys:
        print(f"  {key}: {attrgetter(key)(cfg)}")
