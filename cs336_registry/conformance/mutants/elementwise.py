"""Wrong embedding, linear, silu, swiglu and softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import mutant, mutation
from ._gradients import changed_gradient
from .normalisation import wide


@mutant("embedding", "ids are narrowed to 8 bits, so that large ones wrap around")
def ids_wrap_around(token_ids, weight):
    return F.embedding(token_ids.to(torch.uint8).long() % weight.shape[0], weight)


@mutant("embedding", "of several uses of a token, the last one's gradient is kept instead of the sum")
def last_gradient_wins(token_ids, weight):
    class Lookup(torch.autograd.Function):
        @staticmethod
        def forward(context, table):
            return table[token_ids]

        @staticmethod
        def backward(context, *upstream):
            gradient = torch.zeros_like(weight)
            gradient[token_ids.reshape(-1)] = upstream[0].reshape(-1, weight.shape[-1])
            return gradient

    return Lookup.apply(weight)


@mutant("embedding", "token 0 is taken for padding and gets no gradient")
def token_zero_is_padding(token_ids, weight):
    return F.embedding(token_ids, weight, padding_idx=0)


@mutant("embedding", "rows are scaled by the root of the width, as in the first Transformer")
def rows_scaled(token_ids, weight):
    return F.embedding(token_ids, weight) * weight.shape[-1] ** 0.5


@mutant("embedding", "gradients are scaled by the inverse frequency of the token")
def gradient_by_frequency(token_ids, weight):
    return F.embedding(token_ids, weight, scale_grad_by_freq=True)


@mutant("linear", "a square weight is not transposed")
def square_weight_not_transposed(x, weight):
    return x @ (weight if weight.shape[0] == weight.shape[1] else weight.mT)


@mutant("linear", "the last input features, beyond a block of 16, are left out")
def tail_of_the_sum_left_out(x, weight):
    kept = max(x.shape[-1] // 16 * 16, min(16, x.shape[-1]))
    return x[..., :kept] @ weight[:, :kept].mT


@mutant("linear", "after every 16 products the running sum is rounded to the input's dtype")
def running_sum_rounded(x, weight):
    total = torch.zeros((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[-1], 16):
        total = total + F.linear(x[..., start : start + 16], weight[:, start : start + 16])
    return total


@mutant("linear", "the gradient of the weight sees only the first leading index")
def weight_gradient_of_one_batch(x, weight):
    if x.ndim < 3 or x.shape[0] < 2:
        return F.linear(x, weight)
    return torch.cat([F.linear(x[:1], weight), F.linear(x[1:], weight.detach())])


@mutant("linear", "the gradient of x is not computed")
def input_gradient_missing(x, weight):
    return F.linear(x.detach(), weight)


@mutant("silu", "the sigmoid is of 1.702 x, as in the fast GELU")
def quick_gelu(x):
    return (wide(x) * torch.sigmoid(1.702 * wide(x))).to(x.dtype)


@mutant("silu", "the gradient is the sigmoid alone")
def gradient_of_the_gate_left_out(x):
    return (wide(x) * torch.sigmoid(wide(x)).detach()).to(x.dtype)


@mutant("silu", "exp(x) / (1 + exp(x)) overflows for large x")
def sigmoid_overflows(x):
    return (wide(x) * wide(x).exp() / (1 + wide(x).exp())).to(x.dtype)


@mutant("silu", "the input's memory is reused for the result", groups=("mutation",))
def silu_in_place(x):
    with torch.no_grad():
        return F.silu(x, inplace=True) if not x.requires_grad else x.copy_(F.silu(x))


@mutant("swiglu", "gate and up are swapped")
def gate_and_up_swapped(gate, up):
    return (F.silu(wide(up)) * wide(gate)).to(gate.dtype)


@mutant("swiglu", "the gate is a sigmoid: GLU, not SwiGLU")
def glu_instead(gate, up):
    return (torch.sigmoid(wide(gate)) * wide(up)).to(gate.dtype)


@mutant("swiglu", "the gradient of up is not multiplied by the gate")
def up_gradient_ungated(gate, up):
    gated = F.silu(wide(gate))
    return (changed_gradient(gated * wide(up).detach(), lambda g: g) + (wide(up) - wide(up).detach())).to(gate.dtype)


@mutation("swiglu", "the last columns, short of a block of 8, are never written", groups=("poison",))
def last_columns_uninitialised(textbook):
    def swiglu(gate, up):
        result, width = torch.empty_like(gate), gate.shape[-1]
        kept = max(width // 8 * 8, min(width, 8))
        result[..., :kept] = textbook(gate[..., :kept], up[..., :kept])
        return result

    return swiglu


@mutant("softmax", "the maximum is not subtracted")
def maximum_not_subtracted(x, dim=-1):
    return (wide(x).exp() / wide(x).exp().sum(dim, keepdim=True)).to(x.dtype)


@mutant("softmax", "dim is ignored: always the last")
def always_the_last_dimension(x, dim=-1):
    return torch.softmax(x, -1)


@mutant("softmax", "one maximum for the whole tensor is subtracted, and small rows underflow")
def one_maximum_for_all_rows(x, dim=-1):
    shifted = wide(x) - (wide(x).max() if x.numel() else 0)
    return (shifted.exp() / shifted.exp().sum(dim, keepdim=True)).to(x.dtype)


@mutant("softmax", "1e-6 is added to the sum against a division by zero")
def epsilon_in_the_sum(x, dim=-1):
    powers = (wide(x) - wide(x).amax(dim, keepdim=True)).exp()
    return (powers / (powers.sum(dim, keepdim=True) + 1e-6)).to(x.dtype)


@mutant("softmax", "-inf is replaced by -10, which leaves it some probability")
def minus_infinity_is_only_small(x, dim=-1):
    return torch.softmax(wide(x).nan_to_num(neginf=-10.0), dim).to(x.dtype)


@mutant("softmax", "the gradient leaves out the sum over the row")
def diagonal_gradient_alone(x, dim=-1):
    powers = (wide(x) - wide(x).amax(dim, keepdim=True).detach()).exp()
    return (powers / powers.sum(dim, keepdim=True).detach()).to(x.dtype)


@mutant("softmax", "exponentials and their sum are kept in the input's dtype")
def softmax_in_the_input_dtype(x, dim=-1):
    powers = (x - x.amax(dim, keepdim=True)).exp()
    total = powers.movedim(dim, 0)[:1].sum(0, keepdim=True)
    for row in powers.movedim(dim, 0)[1:]:
        total = total + row
    return powers / total.movedim(0, dim)


@mutant("softmax", "base 2 instead of base e")
def base_two(x, dim=-1):
    return torch.softmax(wide(x) * 0.6931471805599453, dim).to(x.dtype)
