"""Quality cards as rows of a table."""

from patchclamp.results import QualityCard

CARD_HEADER = ("perplexity ratio", "KL", "top-1", "sparsity", "bytes read")


def card_cells(card: QualityCard) -> tuple[str, ...]:
    return (
        f"{card.perplexity_ratio:.4f}",
        f"{card.divergence:.4f}",
        f"{card.top1_agreement:.3f}",
        f"{card.sparsity:.3f}",
        f"{card.bytes_read_16:.3f}",
    )
