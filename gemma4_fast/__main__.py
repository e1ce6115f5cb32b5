"""`python -m gemma4_fast` is `gemma4-fast`."""

import sys

from gemma4_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
