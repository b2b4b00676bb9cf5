"""What the commands that take a config have in common."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .config_files import get_config_file

debug = False  # whether errors show their traceback; `fcos --debug` sets it


def find_config(name: str) -> str:
    """The path of a config file: ``name``, or the config of that name in the model zoo."""
    if not os.path.isfile(name):
        with suppress(FileNotFoundError):  # who reads it says that it is not there
            return get_config_file(name)
    return name


def config_parser(
    description: str, config_required: bool = True, **options
) -> argparse.ArgumentParser:
    """With ``--config-file``, and changes to the config as ``opts``; for parse_intermixed_args."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    parser.add_argument(
        "--config-file",
        required=config_required,
        type=find_config,
        metavar="FILE",
        help="a file, or the name of a config in fcos_d2.model_zoo",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    return parser


@contextmanager
def exit_on_error(*others: type[Exception]) -> Iterator[None]:
    """Make errors of the user's, or of files, one line and the exit code 1."""
    try:
        yield
    except (OSError, ValueError, *others) as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
