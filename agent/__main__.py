# PYTHON_ARGCOMPLETE_OK
"""`python -m agent` is the command `gapstream`."""

import sys

from agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
