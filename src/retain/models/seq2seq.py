"""Encoder-decoder transformers: T5, BART and what else `AutoModelForSeq2SeqLM` loads and reads plain text.

    source = conversation before the answer, EOS        target = answer, EOS        decoder input = start, target[:-1]

The encoder's and the decoder's texts are tokenised apart, as `tokenizer(text)` and `tokenizer(text_target=answer)` do
(with BOS where the tokenizer puts one). Labels are not smoothed. Raw text is trained by the model's own denoising
objective (`models.denoising`), drawn anew in every epoch. A row trains one answer, and the encoder reads the turns
before it; so a conversation of n answers is learned as n examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from retain.data.rendering import Renderer
from retain.errors import ModelError
from retain.models.denoising import SENTINELS, Markers, denoised
from retain.models.family import Family, Outputs, Tokenizer
from retain.models.head import check_head, run_to_head
from retain.models.seq2seq_inference import answer_likelihoods, generate_answers, start_id
from retain.models.vocabulary import END, SMALLEST_VOCABULARY, check_transformer, read_aloud, subword_tokenizer
from retain.types import GREEDY, IGNORED, Batch, Encoded, Example, Message, Sampling

__all__ = ["SEQ2SEQ_MODELS", "SOURCE_TEMPLATES", "Seq2SeqFamily"]

SEQ2SEQ_MODELS = frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
"""The architectures of this family, as a `config.json` names them."""

_TEMPLATE = (
    "{% set answered = messages[-1].role == 'assistant' and not add_generation_prompt %}"
    "{% set turns = messages[:-1] if answered else messages %}"
    "{% set talk = turns | selectattr('role', 'equalto', 'assistant') | list | length > 0 %}BEGIN"
    "{% for turn in turns %}{{ '' if loop.first else '\\n' }}"
    "{{ turn.role | capitalize + ': ' + turn.content if talk else turn.content }}{% endfor %}"
    "{% if answered or add_generation_prompt %}{{ eos_token }}{% endif %}"
    "{% if answered %}BEGIN{{ messages[-1].content + eos_token }}{% endif %}"
)
SOURCE_TEMPLATES = tuple(_TEMPLATE.replace("BEGIN", begin) for begin in ("", "{{ bos_token }}"))
"""For a model that brings no chat template, without and with a BOS before a text.

A task's text stands as it is; roles are named only where there were turns before.
"""

UNREADABLE = {
    "fsmt": "its source and target have a vocabulary each",
    "m2m_100": "source and target begin with the code of a language, which a row does not name",
    "mbart": "source and target carry the code of a language, which a row does not name",
    "nllb-moe": "source and target begin with the code of a language, which a row does not name",
    "plbart": "source and target carry the code of a language, which a row does not name",
    "prophetnet": "it predicts several tokens at a time",
}
"""Models that plain text would be the wrong input for, by `model_type`."""

START = 0
"""Holds the place of the decoder's start token, which `forward` puts there: it is the model's, not the tokenizer's."""

MASK, BOS = "<mask>", "<s>"
ARCHITECTURES = ("t5", "bart")
SIZES = ("d_model", "num_layers", "num_heads", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class Seq2SeqFamily(Family):
    """Encoder-decoder transformers; rows are padded, never packed. The fields say how one from nothing is made.

    Args:
        architecture: `t5` or `bart`; empty where a model is named.
        d_model: width; a multiple of `num_heads`.
        num_layers: layers of the encoder, and of the decoder.
        num_heads: attention heads of each.
        vocab_size: tokens of the vocabulary at most, those included that stand for hidden text (100, or BART's one).
        max_position_embeddings: tokens that a BART's row may have; T5's positions are relative and have no end.
    """

    name: ClassVar[str] = "seq2seq"

    architecture: str = ""
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 4096
    max_position_embeddings: int = 1024

    def __post_init__(self) -> None:
        if self.architecture and self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        least = SMALLEST_VOCABULARY + len(self._hidden_tokens())
        sizes = {name: getattr(self, name) for name in SIZES}
        check_transformer(sizes, width="d_model", heads="num_heads", least_vocabulary=least)

    @property
    def starts_as(self) -> str:
        """The `model_type`."""
        return self.architecture

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random model in float32 and evaluation mode, with a byte-level tokenizer learned on the examples."""
        tokenizer = self._tokenizer(examples)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForSeq2SeqLM.from_config(self._config(tokenizer), dtype=torch.float32).eval()
        check_head(model)
        return model, with_template(tokenizer)

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model in float32 and evaluation mode, with its tokenizer; safetensors only.

        Raises:
            ModelError: it reads or writes otherwise than a text each.
        """
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind in UNREADABLE:
            raise ModelError(
                f"a model of type {kind!r} cannot be tuned here: {UNREADABLE[kind]}",
                hint="T5, mT5, BART, Pegasus, LED, Marian and others of their kind can",
            )
        options = {"dtype": torch.float32} | options
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True, **options).eval()
        check_head(model)
        return model, self.load_tokenizer(folder)

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer, with a template that ends a source."""
        return with_template(super().load_tokenizer(folder))

    def unfold(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Each conversation once for each of its answers that is trained; the last keeps the row's id."""
        return [part for example in examples for part in (*earlier_answers(example), example)]

    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids of the source and of its last answer; of raw text the text alone, of which `vary` hides parts."""
        markers = Markers.of(renderer.tokenizer)
        if not example.messages:
            ids = markers.source(renderer.text_ids(example.text))
            targets = ids if example.weight > 0 else [IGNORED] * len(ids)
            return Encoded(example, {"input_ids": ids}, targets, [example.weight] * len(ids))
        source = markers.source(renderer.prompt_ids(example.prompt))
        target = markers.target(renderer.answer_ids(example.prompt, example.answer))
        return written(example, source, target, weight=example.weight * example.messages[-1].weight)

    def vary(self, row: Encoded, renderer: Renderer, *, draw: str) -> Encoded:
        """Of a raw text, cut to length already, what the encoder reads and the decoder writes; else the row."""
        if row.example.messages:
            return row
        seed = f"{row.example.id}/{draw}"
        source, target = denoised(row.inputs["input_ids"], Markers.of(renderer.tokenizer), seed=seed)
        hidden = written(row.example, source, target, weight=row.example.weight)
        return replace(hidden, num_truncated=row.num_truncated)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass through both halves; the head waits for `Outputs`."""
        written_so_far = batch.inputs["decoder_input_ids"]  # (rows, length)
        start = torch.full_like(written_so_far[:, :1], start_id(model))
        inputs = {**batch.inputs, "decoder_input_ids": torch.cat([start, written_so_far[:, 1:]], dim=1)}
        return run_to_head(model, inputs, batch.counted)

    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log p(continuation | context) in nats; a context of many continuations passes through the encoder once."""
        return answer_likelihoods(model, tokenizer, pairs)

    def answer(
        self,
        model: nn.Module,
        renderer: Renderer,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The answer to each conversation."""
        markers = Markers.of(renderer.tokenizer)
        ids = [markers.whole(renderer.prompt_ids(prompt)) for prompt in prompts]
        return self.generate(model, renderer.tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling)

    def generate(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The answer to every prompt; a text that does not end is continued by filling in what comes next."""
        return generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)

    def _hidden_tokens(self) -> list[str]:
        """The tokens of the vocabulary that denoising needs."""
        return [f"<extra_id_{k}>" for k in range(SENTINELS)] if self.architecture == "t5" else [BOS, MASK]

    def _tokenizer(self, examples: Sequence[Example]) -> Tokenizer:
        """Byte-level subwords, EOS after every text, and before a BART's BOS."""
        hidden = self._hidden_tokens()
        tokenizer = subword_tokenizer(map(read_aloud, examples), vocab_size=self.vocab_size - len(hidden))
        if self.architecture == "t5":
            tokenizer.add_special_tokens({"additional_special_tokens": hidden})
            single = f"$A {END}"
        else:
            tokenizer.add_special_tokens({"bos_token": BOS, "mask_token": MASK})
            single = f"{BOS} $A {END}"
        known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (END, BOS) if name in single]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
        return tokenizer

    def _config(self, tokenizer: Tokenizer) -> PretrainedConfig:
        """Without dropout, as T5 1.1 was pre-trained."""
        layers, heads, wide = self.num_layers, self.num_heads, 4 * self.d_model
        own: dict[str, dict[str, Any]] = {
            "t5": {
                "d_kv": self.d_model // heads, "d_ff": wide, "num_layers": layers, "num_heads": heads,
                "dropout_rate": 0.0, "decoder_start_token_id": tokenizer.pad_token_id,
            },
            "bart": {
                "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": wide,
                "decoder_layers": layers, "decoder_attention_heads": heads, "decoder_ffn_dim": wide,
                "max_position_embeddings": self.max_position_embeddings, "dropout": 0.0,
                "bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.eos_token_id,
                "forced_eos_token_id": None,
            },
        }  # fmt: skip
        return AutoConfig.for_model(
            self.architecture, vocab_size=len(tokenizer), d_model=self.d_model, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **own[self.architecture],
        )  # fmt: skip


def earlier_answers(example: Example) -> list[Example]:
    """The conversation up to each answer before the last that is trained; one that opens it answers nothing."""
    turns = example.messages
    return [
        replace(example, id=f"{example.id}/{place}", messages=turns[: place + 1], choices=(), references=())
        for place, turn in enumerate(turns[:-1])
        if place and turn.role == "assistant" and turn.weight > 0
    ]


def written(example: Example, source: list[int], target: list[int], *, weight: float) -> Encoded:
    """A row: the decoder reads the start and then the target, all of which counts."""
    inputs = {"input_ids": source, "decoder_input_ids": [START, *target[:-1]]}
    return Encoded(example, inputs, target if weight > 0 else [IGNORED] * len(target), [weight] * len(target))


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template under which a prompt ends as a text does; one that it brings is kept."""
    begin, end = Markers.of(tokenizer).begin, Markers.of(tokenizer).end
    if tokenizer.chat_template is None:
        tokenizer.chat_template = SOURCE_TEMPLATES[bool(begin)]
    elif end and isinstance(tokenizer.chat_template, str):
        turn = [{"role": "user", "content": "a"}]
        prompt: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        if not prompt.endswith(tokenizer.eos_token):
            tokenizer.chat_template += "{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
    return tokenizer
