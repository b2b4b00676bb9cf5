"""The command ``fcos``: all that this package does from a terminal, wherever it is installed."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import command_line

# The module and its function, imported when it is called, and what it does.
_COMMANDS = {
    "train": ("commands.train", "main", "train a detector, and evaluate it"),
    "eval": ("commands.train", "evaluate_only", "evaluate a detector"),
    "predict": ("inference.predict", "main", "detect in images or a video, and draw"),
    "export": ("export.__main__", "main", "write an ONNX file"),
    "report": ("commands.report", "main", "a page on one or more runs"),
    "check": ("commands.check", "main", "what is wrong with a data set"),
    "convert": ("commands.convert", "main", "take a checkpoint of another implementation"),
    "app": ("app", "main", "a page that shows what a detector finds"),
}


def main(argv: Sequence[str] | None = None) -> None:
    commands = "\n".join(f"  {name:9}{what}" for name, (*_, what) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fcos",
        description=f"{commands}\n\n`fcos COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    args = parser.parse_args(argv)
    command_line.debug = args.debug
    module, function, _ = _COMMANDS[args.command]
    with command_line.exit_on_error():
        sys.exit(getattr(import_module(f"fcos_d2.{module}"), function)(args.arguments))
