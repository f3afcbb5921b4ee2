"""The texts that a method is given: documents with labels, in windows."""

from dataclasses import dataclass

from patchclamp_server.analysis.corpora.windows import DEFAULT_WINDOW_TOKENS, Corpus
from patchclamp_server.errors import InvalidArgument


@dataclass(frozen=True, eq=False)
class TextSource:
    """`max_tokens`: windows are run up to the first that reaches so many in all; 0: all windows."""

    corpus: Corpus
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    max_tokens: int = 0

    def label(self, name: str, field: str) -> int:
        """Returns the number of a label. Raises InvalidArgument naming `field` for none, and for one no text has."""
        labels = self.corpus.labels
        if name not in labels:
            fault = f"{name!r:.80} is no label of the texts" if name else "required: a label of the texts"
            message = f"{fault}; they have {', '.join(labels) or 'none'}"
            raise InvalidArgument(field, message)
        return labels.index(name)
