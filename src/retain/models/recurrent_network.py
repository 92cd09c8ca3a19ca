"""Recurrent language models (Elman RNN, GRU, LSTM) with the surface of a `transformers` model.

    e_t = embedding[x_t];   h_t, c_t = cell(e_t, h_{t-1}, c_{t-1}), layer upon layer;   logits_t = lm_head(h_t)

Importing this module lets `AutoConfig` and `AutoModelForCausalLM` load them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["CELLS", "RecurrentConfig", "RecurrentForCausalLM", "RecurrentState"]

CELLS: dict[str, type[nn.GRU] | type[nn.LSTM] | type[nn.RNN]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class RecurrentConfig(PretrainedConfig):
    """The shape of a recurrent language model.

    Args:
        vocab_size: tokens.
        cell: `lstm` (Hochreiter and Schmidhuber 1997), `gru` (Cho et al. 2014) or `rnn` (Elman 1990, tanh).
        hidden_size: width of the embedding and of every layer's state.
        num_layers: layers, one reading the other's outputs.
        dropout: of the embedding, between layers and of the output, in [0, 1) (Zaremba et al. 2014).
        tie_word_embeddings: use the embedding as the output head, too (Press and Wolf 2017).
    """

    model_type = "retain-recurrent"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}

    def __init__(
        self,
        vocab_size: int = 4096,
        cell: str = "lstm",
        hidden_size: int = 256,
        num_layers: int = 1,
        dropout: float = 0.0,
        tie_word_embeddings: bool = True,
        **options: Any,
    ) -> None:
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
        self.vocab_size = vocab_size
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        settings: dict[str, Any] = options | {"tie_word_embeddings": tie_word_embeddings}
        super().__init__(**settings)


class RecurrentState(Cache):
    """What a recurrent network remembers of the tokens it has read: its cache for `generate`.

    Attributes:
        tensors: (layers, rows, width) each: the hidden state, and the LSTM's cell state; None before the first token.
        length: tokens read, padding included.
    """

    def __init__(self, tensors: tuple[Tensor, ...] | None = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.tensors = tensors
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        return self.length

    def reset(self) -> None:
        """Forget."""
        self.tensors, self.length = None, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.tensors is not None:
            self.tensors = tuple(tensor.index_select(1, indices.to(tensor.device)) for tensor in self.tensors)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows of the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.tensors is not None:
            self.tensors = tuple(tensor.repeat_interleave(repeats, dim=1) for tensor in self.tensors)

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot be taken back.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a recurrent state does not keep the states before it")


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, recurrent layers, output head."""

    config_class = RecurrentConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embeddings.weight"}  # noqa: RUF012  declared by `PreTrainedModel`
    _is_stateful = True  # `generate` must not try tokens that it then takes back

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rnn = CELLS[config.cell](
            config.hidden_size,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Read the tokens in order, those that the mask leaves out skipped.

        Args:
            input_ids: (rows, time).
            attention_mask: (rows, past + time), 0 where a token is padding, on either side.
            inputs_embeds: (rows, time, width), instead of `input_ids`.
            past_key_values: the state to go on from; changed in place where `use_cache`.
            labels: (rows, time), `input_ids` with -100 where nothing is trained; shifted inside.
            use_cache: return the state after the last token.
            logits_to_keep: only the last so many positions' logits; 0 for all.
            **unused: what `transformers` and PEFT pass to every model, such as `return_dict`.

        Raises:
            ValueError: `position_ids` are given, by which packed documents would be told apart.
        """
        if unused.get("position_ids") is not None:
            raise ValueError("a recurrent network reads on over the border of packed documents; pad them instead")
        embedded = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (rows, time, width)
        past = None if past_key_values is None else past_key_values.tensors
        mask = None if attention_mask is None else attention_mask[:, -embedded.shape[1] :].bool()
        hidden, state = self._read(self.dropout(embedded), mask, past, need_state=bool(use_cache))
        logits = self.lm_head(self.dropout(hidden[:, -logits_to_keep:]))  # (rows, time, vocab)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        cache = None
        if use_cache:
            cache = RecurrentState() if past_key_values is None else past_key_values
            cache.tensors, cache.length = state, cache.length + embedded.shape[1]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _read(
        self, embedded: Tensor, mask: Tensor | None, past: tuple[Tensor, ...] | None, *, need_state: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layers' outputs, (rows, time, width), and the state after each row's last token."""
        start: Any = past[0] if past is not None and len(past) == 1 else past  # a pair for an LSTM, else a tensor
        padded_right = mask is None or not bool((mask[:, 1:] & ~mask[:, :-1]).any())
        if mask is None or bool(mask.all()) or (padded_right and not need_state):
            # Padding on the right is read after all that counts.
            hidden, end = self.rnn(embedded, start)
            return hidden, end if isinstance(end, tuple) else (end,)
        order = (~mask).long().argsort(dim=1, stable=True)  # tokens before padding, in their order
        index = order[..., None].expand_as(embedded)
        packed = pack_padded_sequence(
            embedded.gather(1, index), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        read, end = self.rnn(packed, start)
        moved, _ = pad_packed_sequence(read, batch_first=True, total_length=embedded.shape[1])
        hidden = torch.zeros_like(moved).scatter(1, order[..., None].expand_as(moved), moved)
        return hidden, end if isinstance(end, tuple) else (end,)

    def _init_weights(self, module: nn.Module) -> None:
        """Zaremba's small uniform embedding, PyTorch's own cell, an LSTM that remembers at first."""
        from transformers import initialization as init

        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.1, 0.1)
        elif isinstance(module, nn.RNNBase):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters(recurse=False):
                init.uniform_(parameter, -bound, bound)
                if name.startswith("bias_hh") and isinstance(module, nn.LSTM):
                    # Of input, forget, cell and output gate (Jozefowicz et al. 2015).
                    init.constant_(parameter[module.hidden_size : 2 * module.hidden_size], 1.0)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The first pass of `generate` makes the state, not `transformers` a cache of keys and values."""
        return False


AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig)
AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM)
