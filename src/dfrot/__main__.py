"""`python -m dfrot`."""

import sys

from dfrot_command import main

if __name__ == "__main__":
    sys.exit(main())
