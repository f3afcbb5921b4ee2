"""httpx with the patience of tests: by itself it waits five seconds, which is less than a busy machine takes."""

from functools import partial

import httpx
from patience import PATIENCE_SECONDS

get = partial(httpx.get, timeout=PATIENCE_SECONDS)
post = partial(httpx.post, timeout=PATIENCE_SECONDS)
stream = partial(httpx.stream, timeout=PATIENCE_SECONDS)
