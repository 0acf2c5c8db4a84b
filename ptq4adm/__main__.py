"""`python -m ptq4adm` is the command `ptq4adm`."""

import sys

from ptq4adm.cli import main

if __name__ == "__main__":
    sys.exit(main())
