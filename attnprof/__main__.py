"""``python -m attnprof``."""

import sys

from attnprof.cli import main

if __name__ == "__main__":
    sys.exit(main())
