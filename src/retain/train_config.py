"""How a task is trained: the settings of the one loop."""

from dataclasses import dataclass
from typing import Literal

from retain import distributed

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a task is trained; names and meanings as in TRL and transformers where they have them.

    Args:
        learning_rate: the peak, above 0.
        num_train_epochs: passes over a task's rows, above 0; may be a fraction.
        max_steps: optimizer steps a task instead of epochs; 0 counts epochs.
        per_device_train_batch_size: rows of one step and process, before accumulation.
        gradient_accumulation_steps: multiplies the rows of a step.
        max_tokens_per_batch: tokens of one forward pass; a step's rows are cut into as many passes as that needs, which
            changes memory and speed but not the gradient.
        max_length: tokens that a row may have.
        on_overflow: what happens to longer rows.
        overflow_threshold: share of over-long rows up to which `error` only drops them.
        packing: rows without padding where the family isolates documents (`auto`), never, or always or refused.
        lr_scheduler_type: `linear` or `cosine` down to 0, or `constant`, after the warm-up.
        warmup_ratio: share of the steps over which the rate rises from 0.
        weight_decay: AdamW's, on parameters of two and more dimensions.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's.
        max_grad_norm: the gradient's norm is clipped to it; 0 never clips.
        precision: `bf16` computes matrix products in bf16 over float32 master weights; `auto` where hardware does.
        gradient_checkpointing: compute activations a second time instead of keeping them.
        eval_steps: steps between validation losses; 0 never.
        early_stopping_patience: validations without an improvement before a task ends, its best weights kept; 0 never.
        save_steps: steps between checkpoints inside a task; 0 only where the run is interrupted.
        seed: of everything random.
    """

    learning_rate: float = 2e-4
    num_train_epochs: float = 1.0
    max_steps: int = 0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_tokens_per_batch: int = 2048
    max_length: int = 512
    on_overflow: Literal["error", "drop", "truncate", "split"] = "error"
    overflow_threshold: float = 0.0
    packing: Literal["auto", "always", "never"] = "auto"
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    eval_steps: int = 0
    early_stopping_patience: int = 0
    save_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero = (
            "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
            "max_tokens_per_batch", "max_length",
        )  # fmt: skip
        for name in above_zero:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in (
            "max_steps",
            "weight_decay",
            "max_grad_norm",
            "eval_steps",
            "early_stopping_patience",
            "save_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("warmup_ratio", "overflow_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience: has no effect without eval_steps; set eval_steps too")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * distributed.world_size()
