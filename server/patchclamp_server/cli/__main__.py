"""`python -m patchclamp_server.cli`: `patchclamp serve` without the client's package of commands."""

import sys

from patchclamp_server.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
