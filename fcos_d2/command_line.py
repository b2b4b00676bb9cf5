"""What the commands that take a config have in common."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def config_parser(
    description: str, config_required: bool = True, **options
) -> argparse.ArgumentParser:
    """With ``--config-file``, and changes to the config as ``opts``; for parse_intermixed_args."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    parser.add_argument("--config-file", required=config_required, metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    return parser


@contextmanager
def exit_on_error(*others: type[Exception]) -> Iterator[None]:
    """Make errors of the user's, or of files, one line and the exit code 1."""
    try:
        yield
    except (OSError, ValueError, *others) as error:
        sys.exit(f"error: {error}")
