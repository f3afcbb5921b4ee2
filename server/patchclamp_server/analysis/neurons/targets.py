"""What attributions are of: a number F that a model gives for a prompt, and where its gradient enters the model.

Logits are those that the model gives, after a soft cap where it has one. `tokens` of a target are what runs: the
prompt, and of an answer what precedes its last token.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec


@dataclass(frozen=True)
class LogProbability:
    """F = Σ_i log p(answer_i | prompt, answer_<i)."""

    answer: tuple[int, ...]

    def tokens(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return prompt + self.answer[:-1]

    def value(self, logits: Tensor) -> Tensor:
        """F, float64, of the logits [n, vocab] after the prompt and after each further token that runs."""
        answer = torch.tensor(self.answer, device=logits.device)
        return torch.log_softmax(logits.double(), dim=-1).gather(1, answer[:, None]).sum()

    def check(self, spec: DecoderSpec, field: str) -> None:
        if not self.answer:
            raise InvalidArgument(f"{field}.answer", "has no tokens; accepted: at least one")
        _check_tokens(self.answer, spec, f"{field}.answer")


@dataclass(frozen=True)
class LogitDifference:
    """F = logit(target) - logit(contrast) after the last token of the prompt; without a contrast, logit(target)."""

    target: int
    contrast: int | None = None

    def tokens(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return prompt

    def value(self, logits: Tensor) -> Tensor:
        """F, float64, of the logits [1, vocab] after the prompt."""
        of = logits[0].double()
        return of[self.target] if self.contrast is None else of[self.target] - of[self.contrast]

    def check(self, spec: DecoderSpec, field: str) -> None:
        if self.target == self.contrast:
            raise InvalidArgument(
                f"{field}.contrast", "is the target, the difference is 0 by definition; accepted: another token"
            )
        _check_tokens((self.target,), spec, f"{field}.target")
        if self.contrast is not None:
            _check_tokens((self.contrast,), spec, f"{field}.contrast")


@dataclass(frozen=True, eq=False)
class Projection:
    """F = h · v / ‖v‖ of the activation h [width] at a site, layer and position of the prompt; -1 is its last token.

    Nothing after that layer is run: what lies behind it has no gradient.
    """

    site: Site
    layer: int
    vector: Tensor  # [width]
    position: int = -1

    @property
    def direction(self) -> Tensor:
        unit: Tensor = self.vector.float() / self.vector.float().norm()
        return unit

    def tokens(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return prompt

    def row(self, n: int) -> int:
        """Of the n tokens that run."""
        return self.position % n

    def check(self, spec: DecoderSpec, field: str) -> None:
        if self.site not in spec.sites:
            raise InvalidArgument(f"{field}.site", f"is not of this model; accepted: {_names(spec)}")
        if not 0 <= self.layer < spec.n_layers:
            raise InvalidArgument(f"{field}.layer", f"is {self.layer}; accepted: 0 to {spec.n_layers - 1}")
        width = spec.sites[self.site]
        if self.vector.shape != (width,):
            raise InvalidArgument(f"{field}.vector", f"has the shape {list(self.vector.shape)}; accepted: [{width}]")
        norm = float(self.vector.float().norm())
        if not (norm > 0 and torch.isfinite(self.vector).all()):
            raise InvalidArgument(f"{field}.vector", "has no direction; accepted: finite numbers, not all 0")


Target: TypeAlias = LogProbability | LogitDifference | Projection


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of a prompt, and what is attributed."""

    prompt: tuple[int, ...]
    target: Target

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those that run; the tokens of the prompt are the first ones."""
        return self.target.tokens(self.prompt)

    def place(self, spec: DecoderSpec) -> tuple[int, Site]:
        """Where the gradient enters: layer and site."""
        if isinstance(self.target, Projection):
            return self.target.layer, self.target.site
        return spec.n_layers - 1, Site.RESID_POST

    def check(self, spec: DecoderSpec, field: str) -> None:
        """Raises InvalidArgument by field path: `field`.prompt or `field`.target and what is below it."""
        self.target.check(spec, f"{field}.target")
        n = len(self.tokens)
        if not self.prompt or n > spec.context_length:
            raise InvalidArgument(
                f"{field}.prompt", f"{n} tokens run, with those of an answer; accepted: 1 to {spec.context_length}"
            )
        _check_tokens(self.prompt, spec, f"{field}.prompt")
        if isinstance(self.target, Projection) and not -n <= self.target.position < n:
            raise InvalidArgument(f"{field}.target.position", f"is {self.target.position}; accepted: {-n} to {n - 1}")


def _check_tokens(tokens: tuple[int, ...], spec: DecoderSpec, field: str) -> None:
    for token in tokens:
        if not 0 <= token < spec.vocab_size:
            raise InvalidArgument(field, f"has the token {token}; accepted: 0 to {spec.vocab_size - 1}")


def _names(spec: DecoderSpec) -> str:
    return ", ".join(site.value for site in spec.sites)
