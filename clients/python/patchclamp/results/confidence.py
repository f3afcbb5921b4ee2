"""How far the layers of the model agreed on an answer."""

from dataclasses import dataclass

from patchclamp.results.record import Record


@dataclass(frozen=True)
class OptionConfidence(Record):
    """Holds the probability of an option among all of them at the first generated token, by layer read.

    token: the first token of the option, which stands for it.
    """

    option: str
    token: int
    probability: tuple[float, ...]


@dataclass(frozen=True)
class ConfidenceReport(Record):
    """Says how far the layers agreed; what is by layer is in the order of `layers`.

    consistency: the mean of layer_agreement over the layers before the last.
    layer_agreement: share of the tokens read at which the layer would have said the generated one, or with options the
    option that the last layer puts first. layer_probability: mean probability of the generated token.
    tokens: how many were read; one where there are options.
    """

    consistency: float
    layers: tuple[int, ...]
    layer_agreement: tuple[float, ...]
    layer_probability: tuple[float, ...]
    options: tuple[OptionConfidence, ...]
    tokens: int

    def __str__(self) -> str:
        what = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        said = "".join(
            f", {own.option!r} {own.probability[-1]:.1%} at layer {self.layers[-1]}"
            for own in self.options
            if own.probability
        )
        return f"confidence: layers before the last agree by {self.consistency:.1%} over {what}{said}"
