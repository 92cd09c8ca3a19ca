"""How far a model's predictions are from a teacher's, one target at a time."""

import torch
from torch import Tensor

__all__ = ["distillation_nats"]


def distillation_nats(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """temperature^2 * KL(teacher || model) of every target, nats: 0 where the two agree.

        p = softmax(teacher_logits / temperature);  q = softmax(logits / temperature)
        temperature**2 * (p * (p.log() - q.log())).sum(-1)

    Its gradient with respect to the logits is temperature * (q - p): temperature^2 keeps it as large as that of a
    cross-entropy, whatever the temperature (Hinton et al. 2015, section 2.1).

    Args:
        logits: (num_targets, vocabulary), differentiable.
        teacher_logits: (num_targets, vocabulary); no gradient goes there.
        temperature: above 0; larger ones weigh unlikely tokens more.

    Returns:
        (num_targets,), at least float32.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_q = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)  # (num_targets, vocabulary)
    log_p = torch.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1) * temperature**2
