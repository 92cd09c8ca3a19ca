from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retain.errors import ModelError
from retain.models.gguf import conversion_notes, converted, is_converted

NAMES = {  # of a Llama's weights, here and in llama.cpp
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"


def make_model(vocab_size: int, *, tied: bool) -> LlamaForCausalLM:
    """A Llama whose weights bf16 holds exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=128,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=tied, rope_theta=5000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter).mul_(0.2).bfloat16().float()
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rotary halves: pairs beside each other (`convert_hf_to_gguf.LlamaModel.permute`)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "smollm",
) -> None:
    """The file that llama.cpp's converter would write."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    is_float = kind == gguf.GGMLQuantizationType.F32
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if is_float else gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name == "lm_head.weight":
            if config.tie_word_embeddings:
                continue
            target = "output.weight"
        elif name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        else:
            _, _, layer, *rest, _ = name.split(".")
            short = NAMES[".".join(rest)]
            target = f"blk.{layer}.{short}.weight"
            if short in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if short == "attn_q" else KV_HEADS)
        if weight.ndim == 1 or is_float:
            writer.add_tensor(target, np.ascontiguousarray(weight))
        else:
            writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary with one merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_answers_as_the_original(tmp_path: Path, letters: PreTrainedTokenizerFast, tied: bool):
    model = make_model(len(letters), tied=tied)
    write_gguf(tmp_path / "tiny.gguf", model, letters)
    assert not is_converted("tiny", "0" * 64, tmp_path)
    folder = converted("tiny", [tmp_path / "tiny.gguf"], "0" * 64, tmp_path)
    assert is_converted("tiny", "0" * 64, tmp_path)
    assert conversion_notes(folder) == ("converted from F32 GGUF",)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "retain.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert again.config.tie_word_embeddings is tied
    assert again.generation_config.eos_token_id == 2
    ids = torch.randint(0, len(letters), (2, 40))
    with torch.no_grad():
        # float32 holds llama.cpp's rms_norm_eps and rope base only nearly
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_file_are_joined(tmp_path: Path, letters: PreTrainedTokenizerFast):
    write_gguf(tmp_path / "tiny.gguf", make_model(len(letters), tied=True), letters)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "part0").write_bytes(content[:5000])
    (tmp_path / "part1").write_bytes(content[5000:])
    folder = converted("joined", [tmp_path / "part0", tmp_path / "part1"], "1" * 64, tmp_path)
    whole = converted("whole", [tmp_path / "tiny.gguf"], "1" * 64, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(folder.glob("*.gguf"))


def test_weights_of_four_bits_are_unpacked(tmp_path: Path, letters: PreTrainedTokenizerFast):
    model, kind = make_model(len(letters), tied=True), gguf.GGMLQuantizationType.Q4_1
    write_gguf(tmp_path / "tiny.gguf", model, letters, kind=kind)
    folder = converted("tiny", [tmp_path / "tiny.gguf"], "0" * 64, tmp_path)
    assert conversion_notes(folder) == ("dequantised from 4 bits (Q4_1 GGUF)",)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert "quantization_config" not in again.config.to_dict()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        packed = gguf.quants.quantize(model.state_dict()[name].numpy(), kind)
        expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        torch.testing.assert_close(again.state_dict()[name], expected, rtol=2**-8, atol=0)


def test_the_tokenizer_keeps_what_the_file_says(tmp_path: Path, letters: PreTrainedTokenizerFast):
    write_gguf(tmp_path / "tiny.gguf", make_model(len(letters), tied=True), letters)
    tokenizer = AutoTokenizer.from_pretrained(converted("tiny", [tmp_path / "tiny.gguf"], "0" * 64, tmp_path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    text = "Hà Nội  42<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("pre", "cut"), [("smollm", ["x", "ĠĠ", "4", "2"]), ("gpt-2", ["x", "Ġ", "Ġ42"])])
def test_digits_are_cut_where_the_vocabulary_was_learned_so(
    tmp_path: Path, letters: PreTrainedTokenizerFast, pre: str, cut: list[str]
):
    write_gguf(tmp_path / "tiny.gguf", make_model(len(letters), tied=True), letters, pre=pre)
    tokenizer = AutoTokenizer.from_pretrained(converted("tiny", [tmp_path / "tiny.gguf"], "0" * 64, tmp_path))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  42")
    assert [piece for piece, _ in pieces] == cut


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "wrong.gguf").write_bytes(b"not a GGUF file, but long enough to look at")
    with pytest.raises(ModelError, match=r"wrong\.gguf cannot be read") as caught:
        converted("wrong", [tmp_path / "wrong.gguf"], "0" * 64, tmp_path)
    assert "GGUF" in caught.value.problems[0]
    assert not is_converted("wrong", "0" * 64, tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-network")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="cannot be read"):
        converted("odd", [tmp_path / "odd.gguf"], "0" * 64, tmp_path)
