# Importing any module of this package registers the checks by which the store refuses tensors that are not a watch.
from patchclamp_server.monitoring import stored_tensors

__all__ = ["stored_tensors"]
