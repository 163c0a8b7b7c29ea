"""The command `minidrag` in a clone: python demo.py [PHOTO] [options], or python demo.py --help."""

import sys

from minidrag.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
