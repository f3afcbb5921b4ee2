"""Makes the packages of this repository importable where they are not installed, and gRPC and gguf unnecessary."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bootstrap() -> None:
    """Before torch is imported."""
    for package, folder in (("patchclamp_kernels", "kernels"), ("patchclamp_server", "server")):
        if importlib.util.find_spec(package) is None:
            sys.path.insert(0, str(ROOT / folder))
    from patchclamp_server.threads import configure_threads

    if "torch" not in sys.modules:
        configure_threads()


def without_gguf() -> None:
    """Loading a model from disk may need gguf, which a machine lent for its GPU lacks; nothing here loads one."""
    try:
        importlib.import_module("gguf")
    except ImportError:
        # transformers looks first, so that it does not take the stand-in for the package.
        importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        stand_in = types.ModuleType("gguf")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("gguf", None)
        stand_in.GGUFReader = None
        sys.modules["gguf"] = stand_in
