"""Wrong gradient_clipping, adamw and lr_cosine_schedule."""

from __future__ import annotations

import math

import torch

from ...components.gradient_clipping import gradients_of
from . import mutant, mutation


def total_norm(gradients):
    """The joint L2 norm in at least float32."""
    if not gradients:
        return torch.zeros(())
    kinds = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    kind = torch.float64 if torch.float64 in kinds else torch.float32
    return torch.cat([gradient.to(kind).reshape(-1) for gradient in gradients]).norm()


def scale_by(gradients, factor):
    for gradient in gradients:
        gradient.copy_(gradient.to(factor.dtype) * factor)


@mutant("gradient_clipping", "each tensor is clipped by its own norm")
def clipped_per_tensor(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    for gradient in gradients:
        own = total_norm([gradient])
        if own > max_l2_norm:
            scale_by([gradient], max_l2_norm / (own + eps))
    return norm


@mutant("gradient_clipping", "gradients below the limit are scaled up to it")
def always_scaled(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    scale_by(gradients, max_l2_norm / (norm + eps))
    return norm


@mutant("gradient_clipping", "the norm is the sum of the tensors' norms")
def norms_added(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = sum((total_norm([gradient]) for gradient in gradients), torch.zeros(()))
    if norm > max_l2_norm:
        scale_by(gradients, max_l2_norm / (norm + eps))
    return norm


@mutant("gradient_clipping", "the entries are clipped instead of the norm")
def entries_clipped(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    for gradient in gradients:
        gradient.clamp_(-max_l2_norm, max_l2_norm)
    return norm


@mutant("gradient_clipping", "the norm after clipping is returned")
def clipped_norm_returned(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    if norm > max_l2_norm:
        scale_by(gradients, max_l2_norm / (norm + eps))
        return total_norm(gradients)
    return norm


@mutant("gradient_clipping", "eps is ignored")
def clipping_eps_ignored(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    if norm > max_l2_norm:
        scale_by(gradients, max_l2_norm / norm)
    return norm


@mutant("gradient_clipping", "a parameter that is listed twice is clipped twice")
def shared_parameter_counted_twice(parameters, max_l2_norm, *, eps=1e-6):
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    if norm > max_l2_norm:
        scale_by(gradients, max_l2_norm / (norm + eps))
    return norm


@mutant("gradient_clipping", "squares are summed in the gradients' dtype, and overflow in float16")
def squares_in_the_gradient_dtype(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    wide = total_norm(gradients).dtype
    norm = sum((gradient.square().sum().to(wide) for gradient in gradients), torch.zeros((), dtype=wide)).sqrt()
    if norm > max_l2_norm:
        scale_by(gradients, max_l2_norm / (norm + eps))
    return norm


@mutant("gradient_clipping", "only the first tensor is scaled")
def only_the_first_is_clipped(parameters, max_l2_norm, *, eps=1e-6):
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    if norm > max_l2_norm:
        scale_by(gradients[:1], max_l2_norm / (norm + eps))
    return norm


def _adamw(**bugs):
    """An AdamW class with these bugs; without any it is right."""

    class AdamW(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
            self.count = 0

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None and "no closure" not in bugs:
                with torch.enable_grad():
                    loss = closure()
            self.count += 1
            for group in self.param_groups:
                settings = self.defaults | {"params": group["params"]} if "groups ignored" in bugs else group
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.update(parameter, settings)
                    elif "decay without gradient" in bugs:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
            return loss

        def update(self, parameter, group):
            lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
            if "betas swapped" in bugs:
                beta1, beta2 = beta2, beta1
            wide = (
                parameter.dtype
                if "moments in the parameter's dtype" in bugs
                else torch.promote_types(parameter.dtype, torch.float32)
            )
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
            state["step"] += 1
            t = self.count if "one count for all" in bugs else int(state["step"])
            gradient, value = parameter.grad.to(wide), parameter.to(wide)
            if "decay coupled" in bugs:
                gradient = gradient + decay * value
            elif "decay without lr" in bugs:
                value = value - decay * value
            elif "decay afterwards" not in bugs:
                value = value - lr * decay * value
            first = state["exp_avg"].mul_(beta1).add_((1 - beta1) * gradient)
            if "first moment undamped" in bugs:
                first = state["exp_avg"].add_(beta1 * gradient)
            second = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * gradient.square())
            if "maximum of second moments" in bugs:
                state["largest"] = second = torch.maximum(state.get("largest", second), second).clone()
            if "no bias correction" not in bugs:
                first = first / (1 - beta1**t)
                if "second moment uncorrected" not in bugs:
                    second = second / (1 - beta2**t)
            denominator = (second + eps).sqrt() if "eps inside the root" in bugs else second.sqrt() + eps
            value = value - lr * first / denominator
            if "decay afterwards" in bugs:
                value = value - lr * decay * value
            parameter.copy_(value)

        def load_state_dict(self, state_dict):
            if "state dropped" in bugs:
                state_dict = {"state": {}, "param_groups": state_dict["param_groups"]}
            super().load_state_dict(state_dict)

    return AdamW


def _adamw_bug(bug, name):
    def make(textbook):
        return _adamw(**{bug: True})

    make.__name__ = name
    return make


for _bug, _name, _sentence in (
    ("no bias correction", "bias_not_corrected", "the moments are not bias-corrected"),
    ("second moment uncorrected", "second_moment_not_corrected", "the second moment is not bias-corrected"),
    ("decay coupled", "decay_coupled", "weight decay goes through the moments: Adam with L2"),
    ("decay without lr", "decay_without_learning_rate", "weight decay is not multiplied by the learning rate"),
    ("decay afterwards", "decay_after_the_step", "the parameter decays after the step instead of before"),
    ("eps inside the root", "adamw_eps_inside_the_root", "eps is added inside the root"),
    ("betas swapped", "betas_swapped", "the two betas are swapped"),
    ("one count for all", "steps_counted_together", "the step count is the optimizer's, not each parameter's"),
    ("first moment undamped", "first_moment_accumulates", "new gradients enter the first moment with beta1 once more"),
    ("maximum of second moments", "amsgrad_instead", "the largest second moment so far is used: AMSGrad"),
    ("groups ignored", "groups_ignored", "the settings of parameter groups are ignored"),
    ("decay without gradient", "decays_without_gradient", "parameters without a gradient decay too"),
    ("moments in the parameter's dtype", "moments_in_the_parameter_dtype", "moments are kept in the parameter's dtype"),
    ("state dropped", "loaded_state_dropped", "load_state_dict drops the moments"),
    ("no closure", "closure_ignored", "step(closure) does not call the closure"),
):
    # Without a loss to return, the closure's caller fails.
    mutation("adamw", _sentence, raises=_bug == "no closure")(_adamw_bug(_bug, _name))


@mutation("adamw", "loading a state starts the step count again")
def loaded_count_starts_again(textbook):
    class AdamW(textbook):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            for state in self.state.values():
                state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))

    return AdamW


def _schedule(it, maximum, minimum, warmup, cycle):
    """The right rate, for the mutants to spoil."""
    if it < warmup:
        return it / warmup * maximum
    if it > cycle or (it == cycle and cycle > warmup):
        return minimum
    if cycle == warmup:
        return maximum
    return minimum + (1 + math.cos(math.pi * (it - warmup) / (cycle - warmup))) / 2 * (maximum - minimum)


def _schedule_bug(name, bug, spoil):
    def make(textbook):
        def lr_cosine_schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters):
            return spoil(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)

        return lr_cosine_schedule

    make.__name__ = name
    mutation("lr_cosine_schedule", bug)(make)


_schedule_bug(
    "warmup_starts_at_one",
    "the warm-up counts from 1",
    lambda it, high, low, warm, cycle: (
        min(it + 1, warm) / warm * high if it < warm else _schedule(it, high, low, warm, cycle)
    ),
)
_schedule_bug(
    "warmup_one_too_long",
    "the warm-up lasts one iteration more",
    lambda it, high, low, warm, cycle: (
        _schedule(it, high, low, warm, cycle) if it != warm else high * warm / (warm + 1)
    ),
)
_schedule_bug(
    "warmup_starts_at_minimum",
    "the warm-up rises from the minimum instead of 0",
    lambda it, high, low, warm, cycle: (
        low + it / warm * (high - low) if it < warm else _schedule(it, high, low, warm, cycle)
    ),
)
_schedule_bug(
    "cosine_from_zero",
    "the cosine is measured from iteration 0 instead of the warm-up's end",
    lambda it, high, low, warm, cycle: (
        low + (1 + math.cos(math.pi * it / cycle)) / 2 * (high - low)
        if warm <= it < cycle
        else _schedule(it, high, low, warm, cycle)
    ),
)
_schedule_bug(
    "cosine_not_halved",
    "the cosine runs a whole period",
    lambda it, high, low, warm, cycle: (
        low + (1 + math.cos(2 * math.pi * (it - warm) / (cycle - warm))) / 2 * (high - low)
        if warm <= it < cycle
        else _schedule(it, high, low, warm, cycle)
    ),
)
_schedule_bug(
    "cosine_rises_again",
    "after the cycle the cosine goes on and the rate rises again",
    lambda it, high, low, warm, cycle: (
        low + (1 + math.cos(math.pi * (it - warm) / (cycle - warm))) / 2 * (high - low)
        if it > cycle > warm
        else _schedule(it, high, low, warm, cycle)
    ),
)
_schedule_bug(
    "decay_is_linear",
    "the decay is linear",
    lambda it, high, low, warm, cycle: (
        high - (high - low) * (it - warm) / (cycle - warm)
        if warm <= it < cycle
        else _schedule(it, high, low, warm, cycle)
    ),
)
_schedule_bug(
    "minimum_ignored",
    "after the cycle the rate is 0",
    lambda it, high, low, warm, cycle: 0.0 if it > cycle else _schedule(it, high, low, warm, cycle),
)
_schedule_bug(
    "no_warmup_gives_the_minimum",
    "a warm-up of 0 iterations gives the minimum",
    lambda it, high, low, warm, cycle: low if warm == 0 else _schedule(it, high, low, warm, cycle),
)
_schedule_bug(
    "rate_is_a_tensor",
    "the rate is a numpy number, which no JSON file takes",
    lambda *arguments: __import__("numpy").float64(_schedule(*arguments)),
)
