"""Whole encoders: the readout of the k largest features needs the rows of all of them.

An encoder is read into memory when the first program that asks for it is bound, once for all programs that do, and is
forgotten with the last of them. It takes features x width numbers of the model's dtype on its device.
"""

import threading
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoder_spec import Function
from patchclamp_server.artifacts.autoencoders import Autoencoder

# Pre-activations are made of so many features at a time.
_BLOCK = 16384


class WholeEncoder:
    """f of all features: p = h · E_i + bias_i, where that is above jump_i, else 0; of topk of the `k` largest alone."""

    def __init__(self, artifact_id: str, autoencoder: Autoencoder) -> None:
        self.id = artifact_id
        self.n_features = autoencoder.n_features
        self.k = autoencoder.spec.k if autoencoder.spec.function is Function.TOPK else self.n_features
        rows = autoencoder.file.tensor("encoder")  # [features, width]
        bias = autoencoder.encoder_bias.clone()
        if autoencoder.subtracted is not None:
            subtracted = autoencoder.subtracted.double()
            for start in range(0, self.n_features, _BLOCK):
                bias[start : start + _BLOCK] -= (rows[start : start + _BLOCK].double() @ subtracted).float()
        self._numbers = (rows, bias, autoencoder.threshold)

    def largest(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the k largest f [n, k] of rows h [n, width] float32, largest first, and their features."""
        rows, bias, jump = self._on(h.device)
        values, ids = (
            torch.empty(len(h), 0, device=h.device),
            torch.empty(len(h), 0, dtype=torch.int64, device=h.device),
        )
        for start in range(0, self.n_features, _BLOCK):
            end = min(start + _BLOCK, self.n_features)
            p = torch.addmm(bias[start:end], h, rows[start:end].float().T)
            f = torch.where(p <= jump[start:end], 0.0, p)
            own = torch.arange(start, end, device=h.device).expand(len(h), -1)
            values, ids = torch.cat((values, f), dim=1), torch.cat((ids, own), dim=1)
            top = torch.topk(values, min(k, self.k, values.shape[1]), dim=1)
            values, ids = top.values, ids.gather(1, top.indices)
        return values, ids

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Moves the numbers where they are asked for, and returns them."""
        if self._numbers[0].device != device:
            rows, bias, jump = (numbers.to(device) for numbers in self._numbers)
            self._numbers = (rows, bias, jump)
        return self._numbers


_HELD: WeakValueDictionary[str, WholeEncoder] = WeakValueDictionary()
_LOCK = threading.Lock()


def whole_encoder(artifact_id: str, autoencoder: Autoencoder) -> WholeEncoder:
    """Returns the encoder of this artifact: the one that is held where a program holds it."""
    with _LOCK:
        held = _HELD.get(artifact_id)
        if held is None:
            held = _HELD[artifact_id] = WholeEncoder(artifact_id, autoencoder)
        return held
