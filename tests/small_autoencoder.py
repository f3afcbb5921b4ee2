"""A sparse autoencoder of 256 features, trained within seconds on real activations of the embedded model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kept_sites import KeepSite
from safetensors.torch import save_file
from torch import Tensor

from patchclamp import datasets
from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

SITE, LAYER, FEATURES = Site.RESID_POST, 14, 256
# The first token of a text, on which attention rests, is left out: its norm is that of a hundred others.
_FIRST = 1


@dataclass(frozen=True, eq=False)
class SmallAutoencoder:
    """`tensors` and `provenance` as an artifact has them; `activations` float32 [tokens, width] that it was trained on.

    The function is relu; with_threshold and with_k give the same weights with another.
    """

    tensors: dict[str, Tensor]
    provenance: dict[str, Any]
    activations: Tensor

    def put(self, store: ArtifactStore, fingerprint: str, *tags: str) -> ArtifactInfo:
        return store.put(
            ArtifactKind.AUTOENCODER,
            self.tensors,
            model_fingerprint=fingerprint,
            site=SITE,
            provenance=self.provenance,
            tags=tags,
        )

    def save_saelens(self, directory: Path) -> None:
        """Writes it as SAELens would: sae_weights.safetensors and cfg.json."""
        directory.mkdir()
        own = {"encoder_bias": "b_enc", "decoder": "W_dec", "decoder_bias": "b_dec"}
        weights = {theirs: self.tensors[name] for name, theirs in own.items()}
        save_file(weights | {"W_enc": self.tensors["encoder"].T.contiguous()}, directory / "sae_weights.safetensors")
        hook = {"hook_name": f"blocks.{LAYER}.hook_resid_post", "sae_lens_version": "6.12.1"}
        config = {"architecture": "standard", "apply_b_dec_to_input": True, "metadata": hook}
        (directory / "cfg.json").write_text(json.dumps(config))

    def with_threshold(self, threshold: float) -> "SmallAutoencoder":
        """The same of jumprelu."""
        tensors = {**self.tensors, "threshold": torch.full((FEATURES,), threshold)}
        return SmallAutoencoder(tensors, {**self.provenance, "function": "jumprelu"}, self.activations)

    def with_k(self, k: int) -> "SmallAutoencoder":
        """The same of topk."""
        return SmallAutoencoder(self.tensors, {**self.provenance, "function": "topk", "k": k}, self.activations)

    def encode(self, h: Tensor) -> Tensor:
        """f float32 [tokens, features] of relu, by the formula."""
        p = (h - self.tensors["decoder_bias"]) @ self.tensors["encoder"].T + self.tensors["encoder_bias"]
        return p.clamp(min=0)


def activations(model: LoadedModel, ids: tuple[int, ...]) -> Tensor:
    """float32 [tokens, width] at SITE and LAYER, of a text alone."""
    document, kept = torch.tensor([ids]), KeepSite(SITE)
    decoder = model.decoder
    with torch.inference_mode():
        decoder.forward(inputs_of(document, 0, len(ids), decoder), pools_for(decoder, document), kept)
    return kept.kept[LAYER].float().clone()


def texts() -> dict[str, tuple[str, ...]]:
    """Texts by label: prose, code, and sentences."""
    return dict(datasets.load("code").texts) | dict(datasets.load("sentiment").texts)


def trained(model: LoadedModel, *, per_label: int = 12, steps: int = 300) -> SmallAutoencoder:
    encoder = PromptEncoder(model.tokenizer, model.info)
    chosen = [text for own in texts().values() for text in own[:per_label]]
    x = torch.cat([activations(model, encoder.encode_text(text).ids[:128])[_FIRST:] for text in chosen])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = _train(x, steps)
    return SmallAutoencoder(tensors, {"layer": LAYER, "function": "relu", "subtracted": "decoder_bias"}, x)


def _train(x: Tensor, steps: int) -> dict[str, Tensor]:
    scale = float((x - x.mean(0)).norm(dim=1).mean())
    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, x.shape[1]), dim=1)
    names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
    start = (decoder.clone(), torch.zeros(FEATURES), decoder.clone(), x.mean(0) / scale)
    weights = [tensor.requires_grad_() for tensor in start]
    encoder, encoder_bias, decoder, decoder_bias = weights
    adam = torch.optim.Adam(weights, lr=3e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (256,))] / scale
        f = torch.relu((batch - decoder_bias) @ encoder.T + encoder_bias)
        error = (f @ decoder + decoder_bias - batch).square().sum(1)
        # Longer decoder rows would make the second term small for nothing.
        loss = (error + 0.05 * (f * decoder.norm(dim=1)).sum(1)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = {name: weight.detach() for name, weight in zip(names, weights, strict=True)}
    return found | {name: scale * found[name] for name in ("encoder_bias", "decoder_bias")}
