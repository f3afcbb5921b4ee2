"""A hook of the decoder for tests that look at one site."""

from torch import Tensor

from patchclamp_server.model.sites import Site


class KeepSite:
    """Keeps what stands at one site [T, width], by layer."""

    visited = None

    def __init__(self, site: Site) -> None:
        self.site = site
        self.kept: dict[int, Tensor] = {}

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is self.site:
            self.kept[layer] = x.clone()
