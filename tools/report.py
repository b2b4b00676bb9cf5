#!/usr/bin/env python
"""``fcos report``; see fcos_d2/commands/report.py."""

import sys

from fcos_d2.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
