"""Sites are the activations of a block that can be read and edited, in the order of the forward pass."""

from enum import Enum


class Site(Enum):
    """A site is one activation of a block. The value is the name used in messages, docs and metrics.

    ATTN_Q, the queries of all heads as they meet the keys (after norm and rotation), is the only site that no message
    can name: uniform attention is made there.
    """

    # The hash is that of the object: a decode step looks up 200 places, and Enum's own hash is Python code.
    __hash__ = object.__hash__

    RESID_PRE = "resid_pre"
    ATTN_Q = "attn_q"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    ATTN_Z = "attn_z"
    ATTN_OUT = "attn_out"
    MLP_GATE = "mlp_gate"
    MLP_UP = "mlp_up"
    MLP_POST = "mlp_post"
    MLP_OUT = "mlp_out"

    @property
    def order(self) -> int:
        """The index within a block, in the order of the forward pass."""
        return FORWARD_ORDER.index(self)


FORWARD_ORDER = (
    Site.RESID_PRE,
    Site.ATTN_Q,
    Site.ATTN_Z,
    Site.ATTN_OUT,
    Site.RESID_MID,
    Site.MLP_GATE,
    Site.MLP_UP,
    Site.MLP_POST,
    Site.MLP_OUT,
    Site.RESID_POST,
)
PUBLIC_SITES = tuple(site for site in FORWARD_ORDER if site is not Site.ATTN_Q)
RESIDUAL_SITES = (Site.RESID_PRE, Site.RESID_MID, Site.RESID_POST)
# mlp_post = act(mlp_gate) · mlp_up, or act(mlp_up) in an MLP without a gate.
PREACTIVATION_SITES = (Site.MLP_GATE, Site.MLP_UP)
# One number for each neuron, of the same index at each.
NEURON_SITES = (*PREACTIVATION_SITES, Site.MLP_POST)


def every_preactivation(n_layers: int) -> dict[tuple[Site, int], bool]:
    """Returns the places of all gates and ups, to be visited with copies."""
    return {(site, layer): True for site in PREACTIVATION_SITES for layer in range(n_layers)}


def place_number(site: Site, layer: int) -> int:
    """Numbers the places in the order in which the forward pass reaches them."""
    return layer * len(FORWARD_ORDER) + site.order
