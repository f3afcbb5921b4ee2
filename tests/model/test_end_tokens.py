"""Every token that ends a generation is found, whoever names it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tiny_llama import CHAT_TEMPLATE, byte_tokenizer, save_tiny_llama
from transformers import AddedToken

from patchclamp_server.model.end_tokens import gguf_end_token_ids, turn_end
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import read_header
from patchclamp_server.model.load import load_model, load_pretrained

TOKENS = ["<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "a", "b", "c", "d", "e", "f", "g", "<|end|>"]
NORMAL, CONTROL = 1, 3


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


def ends(directory: Path) -> set[int]:
    return set(load_model(str(directory)).eos_token_ids)


def test_ends_are_those_of_both_configurations_the_tokenizer_and_the_template(model_copy: Path) -> None:
    edit_json(model_copy / "config.json", eos_token_id=[5, 6])
    edit_json(model_copy / "generation_config.json", eos_token_id=[7, 8])
    edit_json(model_copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert ends(model_copy) == {5, 6, 7, 8, 0, 2}


def test_an_end_that_the_model_cannot_generate_is_none(model_copy: Path) -> None:
    edit_json(model_copy / "generation_config.json", eos_token_id=[7, 259])
    assert ends(model_copy) == {2, 7}


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT_TEMPLATE, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role + ':' + m.content + '\n<|endoftext|>\n' }}{% endfor %}", "<|endoftext|>"),
        ("{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}", None),
        # Of the turn that follows.
        ("{% for m in messages %}{{ m.content + '\n- <|im_start|>' }}{% endfor %}", None),
        ({"tool_use": CHAT_TEMPLATE}, None),
        (None, None),
    ],
    ids=["ChatML", "another", "no token", "later", "no default", "no template"],
)
def test_the_end_of_a_turn_is_the_token_behind_what_the_assistant_says(template: Any, end: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_of_two_tokens_that_begin_alike_the_longer_one_ends_the_turn() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im", special=True), AddedToken("<|im_end|>!", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '<|im_end|>!' }}{% endfor %}"
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>!")


def test_a_template_that_cannot_be_rendered_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 1 + 'a' }}"
    with caplog.at_level(logging.WARNING):
        assert turn_end(tokenizer) is None
    assert "TypeError" in caplog.text


def keys(path: Path, types: list[int] | None = None, **ids: int) -> dict[str, Any]:
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types(types or [NORMAL] * len(TOKENS))
    for name, id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_header(path).values


def test_a_gguf_file_names_its_ends_by_keys(tmp_path: Path) -> None:
    named = {"eos": 3, "eot": 4, "eom": 5, "fim_pad": 6, "fim_rep": 7, "fim_sep": 8}
    others = {"bos": 9, "fim_pre": 9, "fim_suf": 9, "fim_mid": 9}
    assert gguf_end_token_ids(keys(tmp_path / "m.gguf", **named, **others)) == {3, 4, 5, 6, 7, 8}


def test_a_control_token_of_a_gguf_file_that_is_an_end_by_its_text_ends_too(tmp_path: Path) -> None:
    types = [CONTROL] * 3 + [NORMAL] * (len(TOKENS) - 3)
    assert gguf_end_token_ids(keys(tmp_path / "m.gguf", types, eos=1)) == {0, 1, 2}


@pytest.mark.usefixtures("own_cache")
def test_a_gguf_file_keeps_all_its_ends(tiny_gguf: Path) -> None:
    assert ends(tiny_gguf) == {0, 2}


@pytest.mark.parametrize("content", ["{}", "", '{"model": 3}'], ids=["empty", "nothing", "no model"])
def test_a_tokenizer_that_cannot_be_read_is_refused_in_a_line(model_copy: Path, content: str) -> None:
    (model_copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelSourceError, match=r"the tokenizer of .* cannot be loaded") as refused:
        load_pretrained(model_copy)
    assert "\n" not in str(refused.value)


def test_named_templates_without_a_default_are_no_chat_template(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(CHAT_TEMPLATE)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert not load_model(str(tmp_path)).info.has_chat_template
