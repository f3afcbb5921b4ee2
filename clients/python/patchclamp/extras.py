"""How to install what only some commands need."""


def install_line(extra: str) -> str:
    """Patchclamp is on no package index: it is installed from its repository."""
    return f"in the repository of Patchclamp, pip install '.[{extra}]'"
