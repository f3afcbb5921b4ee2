"""The card of a quantised model, as text."""

from patchclamp_server.model.info import ModelInfo


def card_text(info: ModelInfo) -> str:
    """Returns the quality, a line for each format, and how many matrices have another than that of the scheme."""
    card = info.quantization
    assert card is not None
    lines = [f"{info.name} in {card.scheme}: {card.bits_per_weight:.2f} bits a weight"]
    if (quality := card.quality) is not None:
        lines += [
            f"  on {quality.tokens} tokens of text, against the dense model:",
            f"  KL(dense || quantised)   {quality.divergence:.3g} nats",
            f"  same first choice        {quality.top1_agreement:.1%}",
            f"  perplexity               {quality.perplexity_ratio:.4f} times {quality.dense_perplexity:.4g}",
        ]
    lines.append("  format  matrices      weights  bits  relative squared error")
    for of in card.formats:
        lines.append(
            f"  {of.format:6}  {of.matrices:8}  {of.weights:11,}  {of.bits_per_weight:4.2f}"
            f"  {of.relative_squared_error:.3g}"
        )
    lines += [f"  {sentence}" for sentence in card.exceptions]
    return "\n".join(lines)
