"""The circuit of a concept found naively: transformers with hooks, one text, token, neuron and head at a time."""

from collections.abc import Callable, Collection

import torch
from attribution_oracle import frozen
from circuit_oracle import Edit, last_logits, with_head
from oracle_sites import family_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchclamp_server.analysis.steering.concept_circuit.scenarios import Scenarios, ScenarioText
from patchclamp_server.model.sites import Site

Seen = dict[tuple[Site, int], Tensor]
# Of one text, by token [T, ...].
OfText = Callable[[Seen], Tensor]


def no_edit(site: Site, layer: int, x: Tensor) -> Tensor:
    return x


class NaiveCircuit:
    """`site` and `layer`: of the direction. Texts are pooled by the mean over their tokens without attention sinks."""

    def __init__(self, model: PreTrainedModel, scenarios: Scenarios, site: Site, layer: int) -> None:
        self.model, self.scenarios, self.site, self.layer = model, scenarios, site, layer
        self.n_heads: int = model.config.num_attention_heads
        self._seen = {text: self._run(text, no_edit) for text in scenarios.texts}
        self._pooled = {text: self._ordinary(seen) for text, seen in self._seen.items()}

    def pool_last(self) -> None:
        """Texts are pooled by their last token from here on; it must be no attention sink."""
        self._pooled = {text: [len(text.ids) - 1] for text in self.scenarios.texts}

    def direction(self, scenarios: Collection[int]) -> Tensor:
        return self.contrast(scenarios, self._state)

    def contrast(self, scenarios: Collection[int], of: OfText, edit: Edit | None = None) -> Tensor:
        """The target's texts less the mean of all values, mean over scenarios, float64."""
        found = []
        for s in scenarios:
            values = [self._mean_of(s, v, of, edit) for v in range(len(self.scenarios.values))]
            found.append(values[self.scenarios.target] - torch.stack(values).mean(0))
        return torch.stack(found).mean(0)

    def target_mean(self, scenarios: Collection[int], of: OfText, edit: Edit | None = None) -> Tensor:
        return torch.stack([self._mean_of(s, self.scenarios.target, of, edit) for s in scenarios]).mean(0)

    def neuron(self, scenarios: Collection[int], layer: int, neuron: int, unit: Tensor) -> float:
        """What a neuron writes along a unit vector."""
        block = self._block(layer)
        weight, bias = _projection(block, family_of(self.model).down_proj)
        norm = _post_norm(block, family_of(self.model).mlp_out)

        def of_text(seen: Seen) -> Tensor:
            rows = seen[Site.MLP_POST, layer].double()
            return torch.stack([_through(norm, a @ weight.T + bias, a[neuron] * weight[:, neuron]) for a in rows])

        return float(self.contrast(scenarios, of_text) @ unit)

    def head(self, scenarios: Collection[int], layer: int, head: int, unit: Tensor) -> float:
        block = self._block(layer)
        weight, bias = _projection(block, family_of(self.model).o_proj)
        norm = _post_norm(block, family_of(self.model).attn_out)

        def of_text(seen: Seen) -> Tensor:
            rows = seen[Site.ATTN_Z, layer].double()
            alone = with_head(torch.zeros_like(rows), head, rows, self.n_heads)
            return torch.stack(
                [_through(norm, z @ weight.T + bias, own @ weight.T) for z, own in zip(rows, alone, strict=True)]
            )

        return float(self.contrast(scenarios, of_text) @ unit)

    def embedding(self, scenarios: Collection[int], unit: Tensor) -> float:
        return float(self.contrast(scenarios, lambda seen: seen[Site.RESID_PRE, 0].double()) @ unit)

    def zeroed(
        self,
        scenarios: Collection[int],
        unit: Tensor,
        neurons: Collection[tuple[int, int]] = (),
        heads: Collection[tuple[int, int]] = (),
    ) -> tuple[float, float]:
        """Projection and separation with neurons and heads set to zero."""

        def edit(site: Site, layer: int, x: Tensor) -> Tensor:
            for own, neuron in neurons if site is Site.MLP_POST else ():
                if own == layer:
                    x = x.clone()
                    x[..., neuron] = 0
            for own, head in heads if site is Site.ATTN_Z else ():
                if own == layer:
                    x = with_head(x, head, torch.zeros_like(x), self.n_heads)
            return x

        projection = self.target_mean(scenarios, self._state, edit) @ unit
        return float(projection), float(self.contrast(scenarios, self._state, edit) @ unit)

    def _state(self, seen: Seen) -> Tensor:
        return seen[self.site, self.layer].double()

    def _mean_of(self, scenario: int, value: int, of: OfText, edit: Edit | None) -> Tensor:
        texts = [t for t in self.scenarios.texts if (t.scenario, t.value) == (scenario, value)]
        seen = [self._seen[text] if edit is None else self._run(text, edit) for text in texts]
        means = [of(each)[self._pooled[text]].mean(0) for text, each in zip(texts, seen, strict=True)]
        return torch.stack(means).mean(0)

    def _run(self, text: ScenarioText, edit: Edit) -> Seen:
        seen: Seen = {}

        def record(site: Site, layer: int, x: Tensor) -> Tensor:
            edited = edit(site, layer, x)
            seen[site, layer] = edited.reshape(len(text.ids), -1).clone()
            return edited

        last_logits(self.model, text.ids, record)
        return seen

    def _ordinary(self, seen: Seen) -> list[int]:
        """Tokens but the first and those of more than three times the median norm."""
        norms = self._state(seen).norm(dim=1).tolist()
        median = sorted(norms[1:])[(len(norms) - 2) // 2]
        return [t for t in range(1, len(norms)) if norms[t] <= 3 * median]

    def _block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(f"{family_of(self.model).blocks}.{layer}")


def _projection(block: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Its weight [d_model, in] and bias [d_model], float64."""
    module = block.get_submodule(path)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    weight = weight.detach().double()
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    return weight, torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double()


def _post_norm(block: nn.Module, path: str) -> nn.Module | None:
    """The norm between a projection and the residual stream, in families that have one."""
    return block.get_submodule(path) if "norm" in path else None


def _through(norm: nn.Module | None, whole: Tensor, part: Tensor) -> Tensor:
    return part if norm is None else frozen(norm, whole, part)
