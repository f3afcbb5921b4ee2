"""Makes the packages of this repository importable where they are not installed."""

import importlib.util
import sys
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
