"""The truth for gradients: plain transformers with hooks, torch's autograd, one sequence, all at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from oracle_sites import attach
from torch import Tensor
from transformers import PreTrainedModel

from patchclamp_server.analysis.neurons.targets import Example, LogProbability, Projection
from patchclamp_server.model.sites import Site


@dataclass
class OraclePass:
    """One pass over an example; what stands at a place is replaced by `replaced` [tokens, width] before it is kept."""

    model: PreTrainedModel
    example: Example
    replaced: Mapping[tuple[Site, int], Tensor] = field(default_factory=dict)
    seen: dict[tuple[Site, int], Tensor] = field(default_factory=dict)

    def value(self) -> Tensor:
        """F, float64; everything in `seen` is part of its graph."""

        def visit(site: Site, layer: int, x: Tensor) -> Tensor:
            if (site, layer) in self.replaced:
                x = self.replaced[site, layer].view(x.shape)
            elif not x.requires_grad:
                x = x.detach().requires_grad_()
            # Hooks that edit in place copy this onto itself.
            self.seen[site, layer] = x
            return x

        hooks = attach(self.model, visit)
        try:
            with torch.enable_grad():
                ids = torch.tensor([list(self.example.tokens)])
                logits = self.model(input_ids=ids, use_cache=False).logits[0].double()
        finally:
            for hook in hooks:
                hook.remove()
        target, n = self.example.target, len(self.example.prompt)
        if isinstance(target, Projection):
            h = self.seen[target.site, target.layer].reshape(len(self.example.tokens), -1)[target.position].double()
            return h @ target.vector.double() / target.vector.double().norm()
        if isinstance(target, LogProbability):
            answer = torch.tensor(target.answer)
            return torch.log_softmax(logits[n - 1 :], dim=-1).gather(1, answer[:, None]).sum()
        difference = logits[n - 1, target.target]
        return difference if target.contrast is None else difference - logits[n - 1, target.contrast]


def oracle_gradient(model: PreTrainedModel, example: Example, site: Site, layer: int) -> tuple[float, Tensor, Tensor]:
    """F, the activation and its gradient, both [tokens, width]."""
    run = OraclePass(model, example)
    value = run.value()
    seen = run.seen[site, layer]
    (gradient,) = torch.autograd.grad(value, seen, allow_unused=True, materialize_grads=True)
    n = len(example.tokens)
    return float(value.detach()), seen.detach().reshape(n, -1), gradient.reshape(n, -1)
