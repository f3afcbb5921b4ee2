"""Names of hooks, as TransformerLens and SAELens write them, and the sites that they are.

    blocks.<l>.hook_resid_pre …    TransformerLens
    model.layers.<l>               the output of a block in transformers, which is resid_post

mlp.hook_pre is what the activation function is applied to: the gate of a gated MLP, else the up projection.
"""

import re
from collections.abc import Collection

from patchclamp_server.model.sites import Site

# The first site is meant that the model has.
_SITES: dict[str, tuple[Site, ...]] = {
    "hook_resid_pre": (Site.RESID_PRE,),
    "hook_resid_mid": (Site.RESID_MID,),
    "hook_resid_post": (Site.RESID_POST,),
    "hook_attn_out": (Site.ATTN_OUT,),
    "hook_mlp_out": (Site.MLP_OUT,),
    "attn.hook_z": (Site.ATTN_Z,),
    "mlp.hook_pre": (Site.MLP_GATE, Site.MLP_UP),
    "mlp.hook_pre_linear": (Site.MLP_UP,),
    "mlp.hook_post": (Site.MLP_POST,),
}
_HOOK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(.+)")
_BLOCK = re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(0|[1-9][0-9]{0,5})")


def place_of_hook(name: str, sites: Collection[Site]) -> tuple[Site, int]:
    """Returns the site and layer of a hook in a model with these sites. Raises ValueError, which names the hook."""
    if match := _BLOCK.fullmatch(name):
        return Site.RESID_POST, int(match[1])
    match = _HOOK.fullmatch(name)
    if match is None or match[2] not in _SITES:
        accepted = ", ".join(f"blocks.<l>.{hook}" for hook in _SITES)
        raise ValueError(f"the hook {name!r:.120} is no site; accepted: {accepted}, model.layers.<l>")
    site = next((site for site in _SITES[match[2]] if site in sites), None)
    if site is None:
        raise ValueError(f"the hook {name!r} is {_SITES[match[2]][0].value}, which the model does not have")
    return site, int(match[1])


def hook_of_place(site: Site, layer: int, sites: Collection[Site]) -> str:
    """Returns the name that TransformerLens gives to a public site."""
    if site is Site.MLP_UP and Site.MLP_GATE not in sites:
        return f"blocks.{layer}.mlp.hook_pre"
    hook = next(
        hook for hook, known in _SITES.items() if site in known and (hook != "mlp.hook_pre" or site is known[0])
    )
    return f"blocks.{layer}.{hook}"
