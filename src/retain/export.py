"""A stage for other tools: what PEFT or `transformers` load without us."""

import json
from pathlib import Path

import torch
from torch import nn

from retain.errors import LineageError
from retain.inference import load_stage
from retain.lineage import Lineage
from retain.models.family import pretrained
from retain.models.ngram import export_arpa
from retain.parameters import device_of

__all__ = ["export_stage"]

TOLERANCE = 1e-3
"""The largest relative difference of logits between an adapter and its merge, in float32."""


def export_stage(lineage: Lineage, to: Path, *, stage: int | None = None, merge: bool = False) -> float:
    """Write a stage with its tokenizer, chat template, stop tokens, and the notice that the base's licence asks for.

    Of an n-gram model, an ARPA file, too.

    Args:
        lineage: where it comes from.
        to: a new or empty folder.
        stage: which; the head where None.
        merge: write a plain model, the adapter merged into its base.

    Returns:
        the largest relative difference of logits that merging made; 0 where nothing was merged.

    Raises:
        LineageError: if the folder is not empty, or the merged model answers otherwise than the adapter does.
    """
    if to.exists() and any(to.iterdir()):
        raise LineageError(f"{to} is not empty", hint="name a new folder")
    target, config = load_stage(lineage, stage)
    model, difference = target.model, 0.0
    ids = torch.tensor([target.renderer.text_ids("The answer to the question is that it depends.")])
    if merge:
        before = logits(model, ids)
        model = config.method.merge(model)
        after = logits(model, ids)
        difference = float((after - before).abs().max() / before.abs().max())
        if difference > TOLERANCE:
            raise LineageError(
                "the merged model answers otherwise than the adapter does",
                problems=[f"its logits differ by {difference:.2g}, at most {TOLERANCE:g} is allowed"],
                hint="export the adapter as it is, without --merge",
            )
    to.mkdir(parents=True, exist_ok=True)
    if merge or (stage if stage is not None else lineage.head) == 0:
        pretrained(model).save_pretrained(to)
    else:
        config.method.save(model, to)
    if not target.family.generates:  # beside an adapter, too: the names of its head's rows
        pretrained(model).config.save_pretrained(to)
    tokenizer = target.renderer.tokenizer
    tokenizer.chat_template = target.renderer.chat_template
    tokenizer.save_pretrained(to)
    if not target.family.needs_gradients:
        export_arpa(model, tokenizer, to / "model.arpa")
    facts = {
        "lineage": lineage.path.name,
        "stage": lineage.head if stage is None else stage,
        "merge_difference": difference,
    }
    if target.notice:
        (to / "NOTICE").write_text(f"{target.notice}\n", encoding="utf-8")
    (to / "retain.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return difference


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(length, vocabulary), float32."""
    ids = ids.to(device_of(model))
    halves = {"decoder_input_ids": ids} if pretrained(model).config.is_encoder_decoder else {}
    return model(input_ids=ids, **halves).logits[0].float()
