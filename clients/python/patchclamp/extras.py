"""How to install what only some commands need."""


def install_line(extra: str) -> str:
    """Returns how an extra is installed: Patchclamp is on no package index, but comes from its repository."""
    return f"in the repository of Patchclamp, pip install '.[{extra}]'"
