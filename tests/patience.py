"""How long a test waits for what is sure to come."""

import os

# It ends a test that would hang, and judges no speed: on a machine with other work everything takes many times longer.
# Where defects are planted, most of which hang at once if they hang at all, mutants.py sets less.
PATIENCE_SECONDS = float(os.environ.get("PATIENCE_SECONDS", "180"))
