"""`python -m megabatch.converters.command`, for a checkout that is not installed."""

import sys

from megabatch.converters.command.main import main

if __name__ == "__main__":
    sys.exit(main())
