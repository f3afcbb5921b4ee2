"""The command `patchclamp`."""

from patchclamp.cli.app import main

__all__ = ["main"]
