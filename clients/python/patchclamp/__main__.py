"""``python -m patchclamp`` is the command `patchclamp`."""

import sys

from patchclamp.cli import main

sys.exit(main())
