#!/usr/bin/env python
"""``fcos check``; see fcos_d2/commands/check.py."""

import sys

from fcos_d2.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
