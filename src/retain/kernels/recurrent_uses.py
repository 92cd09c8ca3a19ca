"""How recurrent layers use their parameters: cells that are read through time, with their backward passes written out.

    a_t = W_ih x_t + b_ih,   q_t = W_hh h_{t-1} + b_hh                       what the gates of time t are given
    LSTM   i, f, g, o = a + q;   c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g);   h_t = sigmoid(o) tanh(c_t)
    GRU    r, z = sigmoid(a + q);   n = tanh(a_n + r q_n);   h_t = (1 - z) n + z h_{t-1}
    RNN    h_t = tanh(a + q), or relu

An example's gradient of W_hh is the sum over its times of dL/dq_t outer h_{t-1}, of W_ih that of dL/da_t outer x_t.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from retain.kernels.parameter_uses import ParameterUses, Rule

__all__ = ["RECURRENT_RULES"]

Read = Callable[[Tensor, Sequence[Tensor], Tensor, Tensor | None], tuple[list[Tensor], tuple[Tensor, ...]]]
"""(a, first state, W_hh, b_hh) -> states, and what `back` needs. All is time first: a is (time, rows, gates * width);
of the first state (rows, width) each, of the states (1 + time, rows, width), before each time and after the last."""

Back = Callable[
    [Sequence[Tensor], tuple[Tensor, ...], Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor, list[Tensor]]
]
"""(states, what was kept, the gradient of h from above, the gradients of the last state, W_hh) -> the gradients of a, q
and the first state."""


@dataclass(frozen=True)
class Cell:
    """A kind of recurrent layer.

    Args:
        read: from the first time to the last.
        back: the gradients, from the last time to the first.
    """

    read: Read
    back: Back


def by_time(*values: Tensor) -> list[tuple[Tensor, ...]]:
    """The values of each time."""
    return list(zip(*(value.unbind() for value in values), strict=True))


def read_lstm(
    a: Tensor, start: Sequence[Tensor], W: Tensor, b: Tensor | None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Of an LSTM; kept are its open gates, (time, rows, gates, width)."""
    times, rows, width = *a.shape[:2], W.shape[1]
    given = a if b is None else a + b
    gates = a.new_empty(times, rows, 4, width)
    hidden, cells = (torch.cat([first[None], a.new_empty(times, rows, width)]) for first in start)
    parts = (given, gates.flatten(2), gates[:, :, :2], *gates.unbind(2), hidden[:-1], hidden[1:], cells[:-1], cells[1:])
    for now, whole, first_two, i, f, g, o, h, new_h, c, new_c in by_time(*parts):
        torch.addmm(now, h, W.T, out=whole)
        first_two.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=new_c).addcmul_(i, g)
        torch.tanh(new_c, out=new_h).mul_(o)
    return [hidden, cells], (gates,)


def back_lstm(
    states: Sequence[Tensor], kept: tuple[Tensor, ...], above: Tensor, ends: Sequence[Tensor], W: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of an LSTM."""
    (gates,), cells = kept, states[1]
    i, f, g, o = gates.unbind(2)  # (time, rows, width) each
    squashed = cells[1:].tanh()
    of_output = o * (1 - o) * squashed
    of_cell = o * (1 - squashed.square())  # dh_t / dc_t
    of_gates = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g.square())], dim=2)
    gradient = torch.empty_like(gates)
    carried, cell = ends[0], ends[1].clone()
    parts = (gradient.flatten(2), gradient[:, :, :3], gradient[:, :, 3], above, of_cell, of_gates, of_output, f)
    for whole, three, fourth, from_above, into_cell, into_three, into_fourth, forget in reversed(by_time(*parts)):
        h = from_above + carried
        cell.addcmul_(h, into_cell)
        torch.mul(cell[:, None], into_three, out=three)
        torch.mul(h, into_fourth, out=fourth)
        cell.mul_(forget)
        carried = whole @ W
    return gradient.flatten(2), gradient.flatten(2), [carried, cell]


def read_gru(
    a: Tensor, start: Sequence[Tensor], W: Tensor, b: Tensor | None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Of a GRU; kept are q_n and r, z, n, (time, rows, gates, width)."""
    times, rows, width = *a.shape[:2], W.shape[1]
    offset = a.new_zeros(len(W)) if b is None else b
    gates = a.new_empty(times, rows, 3, width)
    hidden = torch.cat([start[0][None], a.new_empty(times, rows, width)])
    of_n: list[Tensor] = []
    parts = (a.unflatten(2, (3, width)), gates[:, :, :2], *gates.unbind(2), hidden[:-1], hidden[1:])
    for now, r_z, r, z, n, h, new_h in by_time(*parts):
        q = torch.addmm(offset, h, W.T).unflatten(1, (3, width))  # (rows, gates, width)
        torch.add(now[:, :2], q[:, :2], out=r_z).sigmoid_()
        torch.addcmul(now[:, 2], r, q[:, 2], out=n).tanh_()
        torch.lerp(n, h, z, out=new_h)  # (1 - z) n + z h
        of_n.append(q[:, 2])
    return [hidden], (torch.stack(of_n), gates)


def back_gru(
    states: Sequence[Tensor], kept: tuple[Tensor, ...], above: Tensor, ends: Sequence[Tensor], W: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of a GRU."""
    (q_n, gates), (hidden,) = kept, states
    r, z, n = gates.unbind(2)
    of_n = (1 - z) * (1 - n.square())
    # Of r, z, q_n and a_n, for each unit of dL/dh.
    slopes = torch.stack([of_n * q_n * r * (1 - r), (hidden[:-1] - n) * z * (1 - z), of_n * r, of_n], dim=2)
    gradient = torch.empty_like(slopes)  # (time, rows, 4, width)
    carried = ends[0]
    for whole, from_above, slope, update in reversed(by_time(gradient, above, slopes, z)):
        h = from_above + carried
        torch.mul(h[:, None], slope, out=whole)
        carried = torch.addcmul(whole[:, :3].flatten(1) @ W, h, update)
    return gradient[:, :, [0, 1, 3]].flatten(2), gradient[:, :, :3].flatten(2), [carried]


def plain(activate_: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Cell:
    """A layer with one gate: its activation, in place, and the activation's derivative as a function of its value."""

    def read(
        a: Tensor, start: Sequence[Tensor], W: Tensor, b: Tensor | None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        hidden = torch.cat([start[0][None], torch.empty_like(a)])
        for now, h, new_h in by_time(a if b is None else a + b, hidden[:-1], hidden[1:]):
            activate_(torch.addmm(now, h, W.T, out=new_h))
        return [hidden], ()

    def back(
        states: Sequence[Tensor], kept: tuple[Tensor, ...], above: Tensor, ends: Sequence[Tensor], W: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        gradient = torch.empty_like(above)
        carried = ends[0]
        for whole, from_above, factor in reversed(by_time(gradient, above, slope(states[0][1:]))):
            torch.mul(from_above + carried, factor, out=whole)
            carried = whole @ W
        return gradient, gradient, [carried]

    return Cell(read, back)


class Recurrence(torch.autograd.Function):
    """One layer's outputs and last state, from a and the first state; backward also tells the gradients of a and q."""

    @staticmethod
    def forward(  # noqa: ANN205
        ctx: Any, cell: Cell, receive: Any, W: Tensor, b: Tensor | None, a: Tensor, *start: Tensor
    ):
        """(time, rows, width), and (rows, width) of each part of the last state."""
        states, kept = cell.read(a, [part.to(a.dtype) for part in start], W, b)
        ctx.cell, ctx.receive, ctx.num = cell, receive, len(states)
        ctx.save_for_backward(W, *states, *kept)
        return states[0][1:].clone(), *(state[-1].clone() for state in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Of a and the first state."""
        W, *saved = ctx.saved_tensors
        states = saved[: ctx.num]
        above, *ends = (gradient.to(W.dtype) for gradient in gradients)
        of_a, of_q, of_start = ctx.cell.back(states, tuple(saved[ctx.num :]), above, ends, W)
        ctx.receive(of_a, of_q, states[0][:-1])
        return None, None, None, None, of_a, *of_start


def rule_of(cell: Cell) -> Rule:
    """The rule of a kind of layers: those of one direction, without projections, over rows that are not packed."""

    def rule(
        uses: ParameterUses,
        input: Tensor,
        state: Any,
        weights: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        training: Any,
        bidirectional: Any,
        batch_first: Any = None,  # packed rows come without
    ) -> Any:
        if batch_first is None or bidirectional or input.dim() != 3 or (training and dropout and num_layers > 1):
            return None
        per_layer = 4 if has_biases else 2
        if len(weights) != per_layer * num_layers or not any(uses.find(weight) for weight in weights):
            return None
        hidden = input.transpose(0, 1) if batch_first else input  # (time, rows, inputs)
        if not uses.one_a_row or uses.layout((hidden.shape[1], hidden.shape[0])) is None:
            return None
        states: tuple[Tensor, ...] = state if isinstance(state, tuple) else (state,)  # (layers, rows, width) each
        ends: list[list[Tensor]] = []
        for layer in range(num_layers):
            own = weights[layer * per_layer : (layer + 1) * per_layer]
            hidden, *end = run_layer(uses, cell, hidden, [part[layer] for part in states], own)
            ends.append(end)
        last = [torch.stack(parts) for parts in zip(*ends, strict=True)]
        return (hidden.transpose(0, 1) if batch_first else hidden), *last

    return rule


def run_layer(
    uses: ParameterUses, cell: Cell, input: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One layer's outputs, (time, rows, width), and the parts of its last state, (rows, width)."""
    w_ih, w_hh, b_ih, b_hh = [uses.find(weight) for weight in weights] + [None] * (4 - len(weights))
    W_ih, W_hh, *biases = [weight.detach() for weight in weights]
    layout = uses.layout((input.shape[1], input.shape[0]))
    assert layout is not None
    by_a = uses.record(layout, input, (w_ih, lambda g: (g, turned(read))), (b_ih, lambda g: (None, g)))
    by_q = uses.record(layout, input, (w_hh, lambda g: (g, turned(before[0]))), (b_hh, lambda g: (None, g)))
    before: list[Tensor] = []  # (time, rows, width), h before each time

    def receive(of_a: Tensor, of_q: Tensor, hidden: Tensor) -> None:
        before.append(hidden)
        by_a(turned(of_a))
        by_q(turned(of_q))

    with torch.autocast(input.device.type, enabled=False):
        read = input.to(W_ih.dtype).contiguous()
        a = F.linear(read, W_ih, *biases[:1])  # (time, rows, gates * width)
        reached = a if a.requires_grad else a.requires_grad_()  # backward must come here, also where the input is fixed
        return cast("Any", Recurrence.apply)(cell, receive, W_hh, biases[1] if biases else None, reached, *start)


def turned(values: Tensor) -> Tensor:
    """(rows, time, n) of (time, rows, n)."""
    return values.detach().transpose(0, 1)


RECURRENT_RULES: dict[Callable[..., Any], Rule] = {
    torch.lstm: rule_of(Cell(read_lstm, back_lstm)),
    torch.gru: rule_of(Cell(read_gru, back_gru)),
    torch.rnn_tanh: rule_of(plain(Tensor.tanh_, lambda value: 1 - value.square())),
    torch.rnn_relu: rule_of(plain(Tensor.relu_, lambda value: (value > 0).to(value.dtype))),
}
"""By torch's functions, which `nn.LSTM`, `nn.GRU` and `nn.RNN` call."""
