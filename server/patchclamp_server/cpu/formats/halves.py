"""The float32 of each half-precision number, which compiled code looks up: cheaper than to convert the scale of a block
and then to fill a register with it, and the same on processors that cannot convert."""

import numpy as np

TABLE = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
