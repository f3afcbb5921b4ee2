"""Features of stored autoencoders in watches, by their numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import N_FEATURES, put_autoencoder
from engine_runs import TOLERANCE, Bench, Job, loaded
from programs import prompt
from watch_runs import expected_values, follow, until

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument, NotFound, RequestError
from patchclamp_server.interventions.kinds.features import FeatureReadout
from patchclamp_server.interventions.program import Program, Readout
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import FeaturesOfAutoencoder, WatchItem
from patchclamp_server.monitoring.watch import Watch

FAMILY, LAYER = "llama", 1
INFO = loaded(FAMILY).info


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def bound(store: ArtifactStore | None, ref: str, *features: int, **item: float) -> Watch:
    return bind_watch([WatchItem("sae", FeaturesOfAutoencoder(ref, features), **item)], INFO, store, max_items=100)


def test_features_keep_their_numbers_in_the_names_of_their_items(store: ArtifactStore) -> None:
    ref = put_autoencoder(store, FAMILY, Site.MLP_OUT, LAYER)
    assert bound(store, ref, 31, 7).names == ("sae/L1F31", "sae/L1F7")
    assert bound(store, ref, 31).names == ("sae",)
    assert bound(store, ref, 31).sites == (Site.MLP_OUT,)


def test_they_fire_above_0_unless_told_otherwise(store: ArtifactStore) -> None:
    ref = put_autoencoder(store, FAMILY, Site.RESID_POST, LAYER)
    assert bound(store, ref, 3).thresholds.tolist() == [0.0]
    assert bound(store, ref, 3).quantiles.numel() == 0
    assert bound(store, ref, 3, quantile=0.9).quantiles.tolist() == [0.9]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("function", ["relu", "jumprelu", "batchtopk"])
def test_a_watch_a_readout_and_numpy_agree(function: str, kernels: bool, store: ArtifactStore) -> None:
    ref, features = put_autoencoder(store, FAMILY, Site.RESID_POST, LAYER, function), (7, 0, 31, 12)
    read = Readout(FeatureReadout(ref, features), Site.RESID_POST, "read", (LAYER,))
    job = Job(prompt(f"watched {function}", 14), Program(readouts=(read,)), max_tokens=4, artifacts=store)
    config = EngineConfig(kv_block_size=4, kv_cache_tokens=1024, kernels=kernels, decode_graphs=kernels)
    with reference_only(), Bench(FAMILY, config) as bench:
        followed = follow(bench, bound(store, ref, *features))
        [outcome] = bench.run([job])
        n = len(job.prompt) + len(outcome.tokens) - 1
        # The first token of a sequence is a sink.
        until(lambda: len(followed.values) == n - 1)
        statistics = bench.engine.monitor.statistics("seen")
    [sequence] = {sequence for sequence, _ in followed.values}
    seen = followed.of(sequence)
    expected = expected_values(FAMILY, followed.watch, Job(job.prompt), [*job.prompt, *outcome.tokens][:-1])
    truth = _by_numpy(store, ref, features, expected)
    for position, values in seen.items():
        np.testing.assert_allclose(values, truth[position], atol=TOLERANCE * max(1.0, float(np.abs(truth).max())))
        [own] = [value for value in outcome.readouts if value.position == position]
        np.testing.assert_allclose(own.values, values, rtol=1e-4, atol=1e-4)
    assert statistics.sums.fired.tolist() == (np.stack(list(seen.values())) > 0).sum(axis=0).tolist()
    assert statistics.sums.fired.sum() > 0


def _by_numpy(store: ArtifactStore, ref: str, features: tuple[int, ...], by_row: np.ndarray) -> np.ndarray:
    """The watch has the rows with what is subtracted folded into the bias; here they are as they were stored."""
    tensors = {name: tensor.double().numpy() for name, tensor in store.get(ref).tensors.items()}
    chosen = list(features)
    folded = tensors["encoder_bias"] - tensors["encoder"] @ tensors["decoder_bias"]
    watch = bound(store, ref, *features)
    np.testing.assert_allclose(watch.bias.numpy(), folded[chosen], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(watch.vectors.numpy(), store.get(ref).tensors["encoder"].numpy()[chosen])
    threshold = tensors.get("threshold", np.zeros(N_FEATURES))[chosen]
    np.testing.assert_allclose(watch.jump.numpy(), threshold.clip(min=0), rtol=1e-6)
    return by_row


def test_a_handful_of_65536_features_is_watched_without_the_rest(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = put_autoencoder(store, FAMILY, Site.RESID_POST, LAYER, n_features=65_536)
    # The first opening verifies the bytes against the id, in blocks.
    bound(store, ref, 0)
    read: list[int] = []
    whole = store._blobs.read_range

    def counted(path: str, start: int, end: int) -> bytes:
        read.append(end - start)
        return whole(path, start, end)

    monkeypatch.setattr(store._blobs, "read_range", counted)
    monkeypatch.setattr(store._blobs, "read", lambda path: pytest.fail(f"{path} was read whole"))
    watch = bound(store, ref, 3, 40_000, 65_535)
    # The biases are whole: a number for each feature, and none of its rows.
    assert sum(read) <= 4 * 65_536 + 4 * INFO.d_model * 8
    assert watch.vectors.shape == (3, INFO.d_model)
    assert sum(tensor.numel() for tensor in watch.tensors().values()) < 1000
    with Bench(FAMILY, EngineConfig(kv_block_size=4)) as bench:
        followed = follow(bench, watch)
        [outcome] = bench.run([Job(prompt("large", 9), max_tokens=3)])
        until(lambda: len(followed.values) == 9 + len(outcome.tokens) - 2)


@pytest.mark.parametrize(
    ("features", "field", "error"),
    [
        ((N_FEATURES,), "features[0]", InvalidArgument),
        ((3, 3), "features", InvalidArgument),
        ((), "features", InvalidArgument),
    ],
)
def test_numbers_that_the_autoencoder_does_not_have_are_refused(
    features: tuple[int, ...], field: str, error: type[RequestError], store: ArtifactStore
) -> None:
    ref = put_autoencoder(store, FAMILY, Site.RESID_POST, LAYER)
    with pytest.raises(error) as refused:
        bound(store, ref, *features)
    assert refused.value.field == f"items[0].features.{field}"


def test_what_cannot_be_watched_is_refused_with_the_reason(store: ArtifactStore) -> None:
    at_heads = put_autoencoder(store, FAMILY, Site.ATTN_Z, LAYER, subtracted="nothing")
    topk = put_autoencoder(store, FAMILY, Site.RESID_POST, LAYER, "topk")
    for ref, error, reason in (
        ("nobody", NotFound, "nobody"),
        (at_heads, InvalidArgument, "attn_z"),
        (topk, InvalidArgument, "depends on all 40"),
    ):
        with pytest.raises(error, match=reason) as refused:
            bound(store, ref, 1)
        assert refused.value.field == "items[0].features.autoencoder"


def test_a_stored_watch_needs_no_autoencoder(store: ArtifactStore) -> None:
    ref = put_autoencoder(store, FAMILY, Site.RESID_POST, LAYER, "jumprelu")
    watch = bound(store, ref, 3, 5)
    store.delete(ref)
    again = Watch.from_tensors(watch.tensors())
    assert torch.equal(again.vectors, watch.vectors)
    assert torch.equal(again.jump, watch.jump)
