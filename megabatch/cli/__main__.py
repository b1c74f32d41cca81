"""`python -m megabatch.cli`, for a checkout that is not installed."""

import sys

from megabatch.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
