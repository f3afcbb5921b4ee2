"""Features of sparse autoencoders as programs and watches take them: the rows of those that are chosen, and no other.

Whether a feature of topk is active depends on all features, of which only the rows of chosen ones are at hand. So topk
is refused wherever features are chosen; its k largest can be read. A batchtopk has learned one threshold, by which it
is a jumprelu when it is used.
"""

from patchclamp_server.artifacts.autoencoder_spec import Function
from patchclamp_server.artifacts.autoencoders import Autoencoder, FeatureRows
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.resolver import Resolver, check_indices
from patchclamp_server.model.sites import Site

# The tables hold two vectors for each feature of an edit.
MAX_FEATURES = 1024


def autoencoder_at(
    resolver: Resolver, ref: str, site: Site, layers: tuple[int, ...], path: str, owner: str
) -> Autoencoder:
    """Returns an autoencoder that reads this site of this one layer.

    `path` is that of the reference, `owner` that of the message which has the site and the layers. Raises NotFound,
    InvalidArgument or FailedPrecondition.
    """
    autoencoder = resolver.autoencoder(ref, path)
    spec = autoencoder.spec
    check_place(ref, "reads", (spec.site, spec.layer), (site, layers), owner)
    return autoencoder


def check_place(
    ref: str, does: str, own: tuple[Site, int], given: tuple[Site, tuple[int, ...]], owner: str, field: str = "layers"
) -> None:
    """Raises InvalidArgument where `given` is not what the autoencoder `does` ("reads", "writes")."""
    site, layer = own
    if given[0] is not site:
        message = f"{ref} {does} {site.value} of layer {layer}; expected {site.value}, got {given[0].value}"
        raise InvalidArgument(f"{owner}.site", message)
    if given[1] != (layer,):
        message = f"{ref} {does} {site.value} of layer {layer} alone; expected {layer}"
        raise InvalidArgument(f"{owner}.{field}", message)


def chosen_rows(autoencoder: Autoencoder, ref: str, features: tuple[int, ...], path: str) -> FeatureRows:
    """Reads the rows of these features. `path` is that of the message with the fields autoencoder and features.

    Raises InvalidArgument for numbers that the autoencoder does not have, and for one whose features cannot be told one
    by one.
    """
    if not 1 <= len(features) <= MAX_FEATURES:
        raise InvalidArgument(f"{path}.features", f"expected 1 to {MAX_FEATURES} features, got {len(features)}")
    check_indices(features, autoencoder.n_features, f"{path}.features", "feature")
    check_alone(autoencoder, ref, f"{path}.autoencoder")
    return autoencoder.rows(features)


def check_alone(autoencoder: Autoencoder, ref: str, path: str) -> None:
    """Raises InvalidArgument for a function by which a feature depends on the others."""
    if autoencoder.spec.function is Function.TOPK:
        message = (
            f"{ref} is of the function topk: whether one of its features is active depends on all "
            f"{autoencoder.n_features:,}, and only the rows of chosen ones are held; expected relu, jumprelu or "
            "batchtopk. Of topk the k largest can be read"
        )
        raise InvalidArgument(path, message)
