"""find_package.py NAME: exit status 0 if this Python has a package, 1 if not; imports nothing."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    sys.exit(find_spec(sys.argv[1]) is None)
