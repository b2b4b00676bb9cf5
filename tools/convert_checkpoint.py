#!/usr/bin/env python
"""``fcos convert``; see fcos_d2/commands/convert.py."""

import sys

from fcos_d2.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
