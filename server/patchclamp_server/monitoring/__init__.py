# The store refuses what is no watch as soon as anything of this package is there.
from patchclamp_server.monitoring import stored_tensors

__all__ = ["stored_tensors"]
