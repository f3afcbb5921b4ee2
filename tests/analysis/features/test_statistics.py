"""Sums over tokens give what numpy gives of all activations at once, for every function, and texts are taken whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchclamp_server.analysis.features import statistics as module
from patchclamp_server.analysis.features.statistics import NO_SIDE, FeatureStatistics
from patchclamp_server.artifacts import tensor_file
from patchclamp_server.artifacts.autoencoder_spec import autoencoder_spec
from patchclamp_server.artifacts.autoencoders import Autoencoder
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.reducers.reducer import Place
from patchclamp_server.engine.reducers.whole_texts import WholeTexts
from patchclamp_server.model.sites import Site

F, W, OUT, T = 30, 6, 4, 40


@pytest.mark.parametrize("function", ["relu", "topk", "jumprelu"])
def test_scores_rates_and_explained_variance_equal_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 7 * W * 4)
    monkeypatch.setattr(module, "BATCH_TOKENS", 9)
    torch.manual_seed(0)
    tensors = {"encoder": torch.randn(F, W), "encoder_bias": torch.randn(F)}
    tensors |= {"decoder": torch.randn(F, OUT) / 9, "decoder_bias": torch.randn(OUT)}
    said: dict[str, Any] = {"layer": 1, "function": function, "subtracted": "nothing"}
    said |= {"output_site": "mlp_out", "output_layer": 1}
    if function == "topk":
        said["k"] = 5
    if function == "jumprelu":
        tensors["threshold"] = torch.full((F,), 1.0)
    store = ArtifactStore(tmp_path)
    stored = store.put(ArtifactKind.AUTOENCODER, tensors, model_fingerprint="m", site=Site.RESID_MID, provenance=said)
    info, file = store.open(stored.id)
    autoencoder = Autoencoder(autoencoder_spec(info.site, info.provenance), file)
    x, y = torch.randn(T, W), torch.randn(T, OUT)
    sides = torch.tensor([(0, 1, NO_SIDE)[i % 3] for i in range(T)])
    statistics = FeatureStatistics(autoencoder)
    statistics.add(x[:25], y[:25], sides[:25])
    statistics.add(x[25:], y[25:], sides[25:])

    f = autoencoder.encode(x).double().numpy()
    target, other = f[(sides == 0).numpy()], f[(sides == 1).numpy()]
    n, m = len(target), len(other)
    within = np.sqrt((n * target.var(0) + m * other.var(0)) / (n + m))
    silent = (target.max(0) == 0) & (other.max(0) == 0)
    want = np.where(silent, 0.0, (target.mean(0) - other.mean(0)) / np.where(silent, 1.0, within))
    np.testing.assert_allclose(statistics.scores().numpy(), want, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(statistics.means().numpy(), [target.mean(0), other.mean(0)], rtol=1e-6)
    np.testing.assert_allclose(statistics.rates().numpy(), (f > 0).mean(0))
    assert statistics.active_features == int((f > 0).any(0).sum())
    assert statistics.mean_active == pytest.approx((f > 0).sum(1).mean())
    rebuilt = f @ tensors["decoder"].double().numpy() + tensors["decoder_bias"].double().numpy()
    real = y.double().numpy()
    share = 1 - np.square(real - rebuilt).sum() / np.square(real - real.mean(0)).sum()
    assert statistics.explained_variance == pytest.approx(share, rel=1e-4, abs=1e-5)


def test_a_text_is_taken_once_when_all_its_rows_have_come_at_all_places() -> None:
    texts = WholeTexts([(Site.RESID_MID, 1), (Site.MLP_OUT, 1)])
    inputs, outputs = (reduction.reducer for reduction in texts.reductions)
    ids, x, y = np.array([5, 6, 7]), torch.randn(3, W), torch.randn(3, OUT)
    inputs.add(1, x[:2], Place(text=4, start=0, label=2, ids=ids))
    outputs.add(1, y, Place(text=4, start=0, label=2, ids=ids))
    inputs.add(1, torch.randn(1, W), Place(text=9, start=0, label=0, ids=np.array([1, 2])))
    assert texts.take() == []
    inputs.add(1, x[2:], Place(text=4, start=2, label=2, ids=ids))
    (taken,) = texts.take()
    assert (taken.label, taken.ids.tolist()) == (2, [5, 6, 7])
    assert torch.equal(taken.rows[0], x)
    assert torch.equal(taken.rows[1], y)
    assert texts.take() == []
