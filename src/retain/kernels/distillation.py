"""How far a model's predictions are from a teacher's, one target at a time, in chunks."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["distillation_nats"]

LOGITS_PER_CHUNK = 2**25
"""Logits in float32 that exist at once: 128 MiB for each of a handful of intermediate values."""


def distillation_nats(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """temperature^2 * KL(teacher || model) of every target, nats: 0 where the two agree.

        p = softmax(teacher_logits / temperature);  q = softmax(logits / temperature)
        temperature**2 * (p * (p.log() - q.log())).sum(-1)

    Its gradient with respect to the logits is temperature * (q - p): temperature^2 keeps it as large as that of a
    cross-entropy, whatever the temperature (Hinton et al. 2015, section 2.1).

    Args:
        logits: (num_targets, vocabulary), differentiable.
        teacher_logits: (num_targets, vocabulary); no gradient goes there.
        temperature: above 0; larger ones weigh unlikely tokens more.
        chunk: rows at once; found from the vocabulary where None. Only the two logits exist whole.

    Returns:
        (num_targets,), at least float32.
    """
    rows = chunk or max(16, LOGITS_PER_CHUNK // logits.shape[-1])
    teacher_logits = teacher_logits.detach()

    def nats(ours: Tensor, theirs: Tensor) -> Tensor:
        dtype = torch.promote_types(ours.dtype, torch.float32)
        log_q = torch.log_softmax(ours.to(dtype) / temperature, dim=-1)  # (rows, vocabulary)
        log_p = torch.log_softmax(theirs.to(dtype) / temperature, dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1) * temperature**2

    if len(logits) <= rows:
        return nats(logits, teacher_logits)
    pieces = zip(logits.split(rows), teacher_logits.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([nats(ours, theirs) for ours, theirs in pieces])
    return torch.cat([checkpoint(nats, ours, theirs, use_reentrant=False) for ours, theirs in pieces])
