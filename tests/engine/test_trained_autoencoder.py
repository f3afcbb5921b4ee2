"""A small autoencoder that is trained here on states of the embedded model: an edit changes its feature's part alone.

Of an edited row, h' - h = (g - f) d to rounding, whatever else is in the batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pytest
import torch
from live import LiveServer
from torch import Tensor

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.request import Event, Failed, Readouts, Reduction, Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.kinds.features import FeatureEdit, FeatureReadout
from patchclamp_server.interventions.program import Edit, NeuronOp, Program, Readout
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site

SITE, LAYER, N = Site.RESID_POST, 12, 48
WINDOWS, LENGTH = 4, 96


@dataclass(frozen=True, eq=False)
class Trained:
    model: LoadedModel
    store: ArtifactStore
    ref: str
    texts: tuple[tuple[int, ...], ...]
    # Of each text, [tokens, width].
    states: tuple[Tensor, ...]


def rows_of(
    model: LoadedModel,
    texts: Sequence[tuple[int, ...]],
    programs: Sequence[Program | None],
    store: ArtifactStore,
    **config: bool,
) -> tuple[list[Tensor], list[list[tuple[float, ...]]]]:
    """The states of each text at the site after its edits, and the values that its program read, all in one batch."""
    engine = Engine(model, EngineConfig(enable_prefix_cache=False, **config))
    kept, events = [KeptRows((LAYER,)) for _ in texts], [list[Event]() for _ in texts]
    for own, text, program, told in zip(kept, texts, programs, events, strict=True):
        bound = None if program is None else bind(program, model.info, store)
        stop, reduction = StopParams(max_tokens=0), Reduction(SITE, own)
        engine.submit(Request(text, told.append, program=bound, stop=stop, reductions=(reduction,)))
    while engine.step():
        pass
    assert not [event for told in events for event in told if isinstance(event, Failed)]
    read = [[v.values for event in told if isinstance(event, Readouts) for v in event.values] for told in events]
    return [own.rows(LAYER) for own in kept], read


@pytest.fixture(scope="module")
def trained(embedded_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model, store = embedded_server.model, ArtifactStore(tmp_path_factory.mktemp("trained"))
    text = files("patchclamp_server.analysis").joinpath("data/ordinary.txt").read_text(encoding="utf-8")
    ids = model.tokenizer(text[: 8 * WINDOWS * LENGTH])["input_ids"]
    texts = tuple(tuple(ids[i * LENGTH : (i + 1) * LENGTH]) for i in range(WINDOWS))
    states, _ = rows_of(model, texts, [None] * WINDOWS, store)
    info = store.put(
        ArtifactKind.AUTOENCODER,
        # The first token of a text is a sink, thirty times as long as the others.
        _train(torch.cat([own[1:] for own in states])),
        model_fingerprint=model.info.fingerprint,
        site=SITE,
        provenance={"layer": LAYER, "function": "relu", "subtracted": "decoder_bias"},
    )
    return Trained(model, store, info.id, texts, tuple(states))


def _train(x: Tensor) -> dict[str, Tensor]:
    """Adam on |x - reconstruction|² + 0.02 Σ f, with decoder rows of length 1 to begin with."""
    with torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        scale = float((x - x.mean(dim=0)).norm(dim=1).mean())
        decoder = torch.nn.functional.normalize(torch.randn(N, x.shape[1], generator=generator), dim=1)
        weights = [decoder.clone(), torch.zeros(N), decoder, x.mean(dim=0) / scale]
        for weight in weights:
            weight.requires_grad_()
        encoder, bias, decoder, centre = weights
        adam = torch.optim.Adam(weights, lr=3e-3)
        for _ in range(150):
            h = x / scale
            f = torch.relu((h - centre) @ encoder.T + bias)
            loss = (h - f @ decoder - centre).square().sum(dim=1).mean() + 0.02 * f.sum(dim=1).mean()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    explained = 1 - float((h - f @ decoder - centre).square().sum() / (h - h.mean(dim=0)).square().sum())
    assert explained > 0.5, explained
    return {
        "encoder": encoder.detach(),
        "encoder_bias": scale * bias.detach(),
        "decoder": decoder.detach(),
        "decoder_bias": scale * centre.detach(),
    }


def by_numpy(trained: Trained, states: Tensor) -> np.ndarray:
    stored = {name: tensor.double().numpy() for name, tensor in trained.store.get(trained.ref).tensors.items()}
    h = states.double().numpy() - stored["decoder_bias"]
    return np.maximum(h @ stored["encoder"].T + stored["encoder_bias"], 0.0)


@pytest.mark.parametrize("executor", ["operators", "kernels"])
def test_an_edit_changes_its_feature_s_part_alone_in_a_mixed_batch(trained: Trained, executor: str) -> None:
    f = [by_numpy(trained, states) for states in trained.states]
    feature = int(np.concatenate(f).mean(axis=0).argmax())
    every = (Readout(FeatureReadout(trained.ref, tuple(range(N))), SITE, layers=(LAYER,)),)
    ops = [(NeuronOp.SET, (30.0,)), (NeuronOp.SCALE, (0.0,)), (NeuronOp.ADD, (5.0,))]
    edits = [Edit(FeatureEdit(trained.ref, (feature,), op, values), SITE, layers=(LAYER,)) for op, values in ops]
    programs = [Program((own,), every) for own in edits] + [None]
    config = {"kernels": True} if executor == "kernels" else {}
    with nullcontext() if executor == "operators" else reference_only():
        plain, _ = rows_of(trained.model, trained.texts, [Program((), every)] * WINDOWS, trained.store, **config)
        edited, read = rows_of(trained.model, trained.texts, programs, trained.store, **config)
    decoder = trained.store.get(trained.ref).tensors["decoder"][feature].double()
    for i, goal in enumerate((lambda f: np.full_like(f, 30.0), lambda f: 0 * f, lambda f: f + 5.0)):
        before = by_numpy(trained, plain[i])[:, feature]
        expected = torch.from_numpy(goal(before) - before)[:, None] * decoder
        change = edited[i].double() - plain[i].double()
        # Of a row's own scale: float32 resolves no more of it.
        error = (change - expected).norm(dim=1) / plain[i].double().norm(dim=1)
        assert float(error.max()) < 1e-6
        assert float(expected.norm(dim=1).max()) > 1.0
        # What is read is that of the row after its edit.
        np.testing.assert_allclose(np.array(read[i]), by_numpy(trained, edited[i]), rtol=1e-4, atol=1e-3)
    assert torch.equal(edited[3], plain[3])
