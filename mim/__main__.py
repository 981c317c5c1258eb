"""``python -m mim``."""

import sys

from mim.cli import main

if __name__ == "__main__":
    sys.exit(main())
