"""What the HTTP front costs beside gRPC: see http_front.py, which this runs.

    python benchmarks/http.py [--rounds 5] [--tokens 64] [options of `patchclamp serve`]

Its name is also that of a package of the standard library, which the other scripts of this directory import: to them
this module is that package.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "http":
    package = Path(sysconfig.get_path("stdlib")) / "http"
    spec = importlib.util.spec_from_file_location(
        "http", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["http"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["http"])
elif __name__ == "__main__":
    from http_front import main

    main()
