"""`python -m dfrot`."""

import sys

from dfrot.cli import main

if __name__ == "__main__":
    sys.exit(main())
