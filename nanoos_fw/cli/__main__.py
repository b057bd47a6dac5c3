"""``python -m nanoos_fw.cli``."""

import sys

from nanoos_fw.cli import main

if __name__ == "__main__":
    sys.exit(main())
