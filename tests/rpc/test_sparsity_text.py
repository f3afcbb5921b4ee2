"""Text → documents of one length."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from patchclamp.v1 import sparsity_pb2 as pb
from patchclamp_server.analysis.sparsity.job import Text
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.sparsity_job import decode_text
from patchclamp_server.text.prompt import PromptEncoder

START = 1


def info(context_length: int = 64) -> ModelInfo:
    return ModelInfo("tiny", "f", "llama", 2, 8, 16, 2, 2, 4, 300, context_length, "float32", "cpu", sites={})


Encoder = Callable[..., PromptEncoder]


@pytest.fixture
def encoder(tiny_llama_dir: Path) -> Encoder:
    """Of one token a byte; `starts`: with a special token before a text."""

    def make(*, starts: bool = False, context_length: int = 64) -> PromptEncoder:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
        if starts:
            special = [("<|im_start|>", START)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=special)
        return PromptEncoder(tokenizer, info(context_length))

    return make


Cut = Callable[..., Text]


@pytest.fixture
def cut(encoder: Encoder) -> Cut:
    def make(*texts: str, tokens: int = 4, starts: bool = False, most: int = 1000) -> Text:
        proto = pb.SparsityText(texts=texts, document_tokens=tokens)
        return decode_text(proto, encoder(starts=starts), info(), most)

    return make


def test_long_texts_are_cut_and_what_fills_no_document_is_left_out(cut: Cut, encoder: Encoder) -> None:
    prompts = encoder()
    documents = cut("abcdefghij", "xyz", "klmn").documents
    expected = [prompts.encode_continuation(part) for part in ("abcd", "efgh", "klmn")]
    assert [tuple(document) for document in documents.tolist()] == expected


def test_every_document_starts_as_a_text_does(cut: Cut, encoder: Encoder) -> None:
    documents = cut("abcdefgh", starts=True).documents.tolist()
    assert [document[0] for document in documents] == [START] * 2
    assert [tuple(d[1:]) for d in documents] == [encoder().encode_continuation(part) for part in ("abc", "def")]


def test_documents_have_512_tokens_or_the_context_of_the_model(encoder: Encoder) -> None:
    proto = pb.SparsityText(texts=["a" * 2000])
    assert decode_text(proto, encoder(), info(64), 10_000).documents.shape == (31, 64)
    long = info(4096)
    assert decode_text(proto, encoder(context_length=4096), long, 10_000).documents.shape == (3, 512)


def test_more_tokens_than_are_accepted_are_refused_and_the_message_says_how_many_are(cut: Cut) -> None:
    assert len(cut("a" * 40, most=40).documents) == 10
    with pytest.raises(InvalidArgument, match="more than 9 documents of 4 tokens") as refusal:
        cut("a" * 20, "b" * 20, most=39)
    assert refusal.value.field == "text.texts"


@pytest.mark.parametrize(
    ("proto", "field"),
    [
        (pb.SparsityText(), "text.texts"),
        (pb.SparsityText(texts=["", "abc"], document_tokens=4), "text.texts"),
        (pb.SparsityText(texts=["abc"], document_tokens=3), "text.document_tokens"),
        (pb.SparsityText(texts=["abc"], document_tokens=65), "text.document_tokens"),
        (pb.SparsityText(texts=["abc"], document_tokens=2**32 - 1), "text.document_tokens"),
        (pb.SparsityText(texts=["a" * 99], description="x" * 20_000), "text.description"),
    ],
)
def test_text_of_which_no_document_can_be_made_is_refused(encoder: Encoder, proto: pb.SparsityText, field: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        decode_text(proto, encoder(), info(), 1000)
    assert refusal.value.field == field


def test_a_digest_is_that_of_the_documents_in_their_order(cut: Cut) -> None:
    assert cut("abcdefgh").digest == cut("abcd", "efgh").digest
    assert cut("abcdefgh").digest != cut("efghabcd").digest
