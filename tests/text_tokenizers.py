"""Tokenizers as models have them, of a small vocabulary. They differ in how they read spaces and a text's start."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ("once", "upon", "a", "time", "lo", "world", "hello", "Mary", "gave", "drink", "to", "an")
CORPUS = [" ".join((*WORDS[i:], *WORDS[:i])).capitalize() + "." for i in range(len(WORDS))] * 2
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bpe(normalizer: normalizers.Normalizer | None, pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """Merges of single words, as SentencePiece trains them; the steps before them are the model's own."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    trained = json.loads(backend.to_str())
    # Bytes are in the vocabulary, and nothing that a text is cut at.
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in SPECIAL]
    own = Tokenizer.from_str(json.dumps(trained))
    own.normalizer, own.pre_tokenizer = normalizer, pre_tokenizer
    return own


def _sentencepiece(backend: Tokenizer, *, strips: bool) -> Tokenizer:
    """Decoded as Llama's and Gemma's are: byte tokens, and no space before a text where one is put there."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return backend


def _llama2() -> Tokenizer:
    prefix = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(_bpe(prefix, None), strips=True)


def _metaspace(scheme: str) -> Tokenizer:
    return _sentencepiece(_bpe(None, pre_tokenizers.Metaspace("▁", scheme)), strips=scheme != "never")


def _metaspace_whole() -> Tokenizer:
    """Llama's without `legacy`: a text is not split at its spaces."""
    return _sentencepiece(_bpe(None, pre_tokenizers.Metaspace("▁", "first", split=False)), strips=True)


def _gemma() -> Tokenizer:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return _sentencepiece(_bpe(normalizers.Replace(" ", "▁"), split), strips=False)


def _unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    backend.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _byte_level(add_prefix_space: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama2": _llama2,
    "metaspace always": lambda: _metaspace("always"),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace never": lambda: _metaspace("never"),
    "metaspace not split": _metaspace_whole,
    "gemma": _gemma,
    "unigram": _unigram,
    "byte level": lambda: _byte_level(False),
    "byte level with a space": lambda: _byte_level(True),
}
# Those that write a space before a text.
PREFIXING = tuple(kind for kind in KINDS if kind not in ("metaspace never", "gemma", "byte level"))


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The same object at every call, so do not change it; a text begins with <s>."""
    backend = KINDS[kind]()
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
