"""AdamW in one launch, and gradient clipping folded into it."""

from __future__ import annotations

import pytest
import torch

import cs336_registry as registry
from cs336_registry.compare import assert_within
from cs336_registry.component import Tolerance
from cs336_registry.components.adamw import oracle

from .kernel_checks import BFLOAT16, DEVICE, DTYPES, maker

SHAPES = ((7, 5), (11,), (), (0, 3), (1, 2, 3))


@pytest.fixture
def adamw():
    from cs336_triton.adamw import AdamW

    return AdamW


def parameters_of(make, shapes=SHAPES):
    return [make.normal(*shape).requires_grad_() for shape in shapes]


def take_steps(optimizers, lists, make, steps, *, scale=1.0):
    """The same gradients for every list of parameters, each in its own dtype."""
    for _ in range(steps):
        for group in zip(*lists, strict=True):
            gradient = make.normal(*group[0].shape, scale=scale)
            for parameter in group:
                parameter.grad = gradient.to(parameter.dtype, copy=True)
        for optimizer in optimizers:
            optimizer.step()


def twin(parameters, dtype=None):
    return [parameter.detach().to(dtype or parameter.dtype, copy=True).requires_grad_() for parameter in parameters]


@pytest.mark.parametrize("settings", [{}, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES, "float64"])
def test_matches_float64(adamw, dtype, settings):
    contract = registry.contract("adamw")
    found = parameters_of(maker(dtype))
    truth, plain = twin(found, torch.float64), twin(found)
    optimizers = [
        adamw(found, **settings),
        oracle([{"params": truth}], **settings),
        oracle([{"params": plain}], **settings),
    ]
    take_steps(optimizers, [found, truth, plain], maker(dtype, seed=1), 4)
    for one, true, base in zip(found, truth, plain, strict=True):
        assert_within(one, true.detach(), base, contract.tolerance)


def test_a_hundred_steps(adamw):
    """Rounding errors of 120 steps add up at most like 120 independent ones, with a factor for their correlation."""
    found = parameters_of(maker(), ((33,), (4, 5)))
    truth = twin(found, torch.float64)
    optimizers = [adamw(found, lr=1e-2), torch.optim.AdamW(truth, lr=1e-2)]
    take_steps(optimizers, [found, truth], maker(seed=1), 120)
    for one, true in zip(found, truth, strict=True):
        assert_within(one, true.detach(), one, Tolerance(factor=0.0, floor=4 * 120**0.5))


@pytest.mark.parametrize("length", [16383, 16384, 16385, 40000])
def test_tensors_around_a_chunk(adamw, length):
    found = parameters_of(maker(), ((length,),))
    truth = twin(found, torch.float64)
    take_steps([adamw(found), torch.optim.AdamW(truth)], [found, truth], maker(seed=1), 2)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-6, atol=1e-6)


def test_nothing_else_is_written(adamw):
    """Gradients stay, and so do the entries around a parameter that is a slice of a larger tensor."""
    storage = torch.full((30,), 7.0, device=DEVICE)
    parameter = storage[5:16].requires_grad_()
    parameter.grad = maker().normal(11)
    kept = parameter.grad.clone()
    adamw([parameter], max_l2_norm=0.1).step()
    assert torch.equal(parameter.grad, kept)
    assert (storage[:5] == 7).all() and (storage[16:] == 7).all() and not (parameter == 7).any()


@pytest.mark.parametrize("layout", ["transposed", "padded"])
def test_any_layout_of_parameters_and_gradients(adamw, layout):
    plain = maker().normal(6, 5).requires_grad_()
    strided = maker(strided=True).normal(6, 5) if layout == "padded" else plain.detach().t().contiguous().t()
    strided.requires_grad_()
    gradient = maker(seed=1).normal(6, 5)
    plain.grad, strided.grad = gradient, gradient.t().contiguous().t()
    for parameter in (plain, strided):
        adamw([parameter], lr=0.1).step()
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("max_l2_norm", [0.5, 1e3])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_clipping_inside_the_step_is_clipping_before_it(adamw, dtype, max_l2_norm):
    found = parameters_of(maker(dtype))
    wide = twin(found, torch.float64)
    inside, plain = adamw(found, lr=0.1, max_l2_norm=max_l2_norm), torch.optim.AdamW(wide, lr=0.1)
    make = maker(dtype, seed=1)
    for _ in range(3):
        for narrow, parameter in zip(found, wide, strict=True):
            narrow.grad = make.normal(*narrow.shape)
            parameter.grad = narrow.grad.double().clone()
            parameter.data.copy_(narrow)
        norm = torch.nn.utils.clip_grad_norm_(wide, max_l2_norm)
        inside.step()
        plain.step()
        torch.testing.assert_close(inside.gradient_norm.double(), norm, rtol=1e-6, atol=0)
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    for one, true in zip(found, wide, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=4 * epsilon, atol=4 * epsilon)


def test_the_norm_is_over_all_groups(adamw):
    first, second = parameters_of(maker(), ((3,), (4,)))
    first.grad, second.grad = torch.full_like(first, 2.0), torch.full_like(second, 3.0)
    optimizer = adamw([{"params": [first]}, {"params": [second], "lr": 1.0}], max_l2_norm=1.0)
    optimizer.step()
    assert optimizer.gradient_norm.item() == pytest.approx((3 * 4 + 4 * 9) ** 0.5)


def test_groups_and_missing_gradients(adamw):
    """Parameters that missed a step are a step behind, each with its own bias correction."""
    found = parameters_of(maker(), ((3,), (4,), (5,)))
    truth = twin(found, torch.float64)
    optimizers = [
        adamw([{"params": found[:2]}, {"params": found[2:], "lr": 0.1, "weight_decay": 0.0}]),
        torch.optim.AdamW([{"params": truth[:2]}, {"params": truth[2:], "lr": 0.1, "weight_decay": 0.0}]),
    ]
    make = maker(seed=1)
    for step in range(4):
        for index, (one, true) in enumerate(zip(found, truth, strict=True)):
            one.grad = None if (step + index) % 3 == 0 else make.normal(*one.shape)
            true.grad = None if one.grad is None else one.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    for one, true in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_master_weights_keep_small_updates(adamw, dtype):
    """An update of a fraction of the parameter's rounding error is lost without them."""
    start = torch.ones(8, dtype=getattr(torch, dtype), device=DEVICE)
    lr = torch.finfo(start.dtype).eps / 16
    results = {}
    for master in (False, True):
        parameter = start.clone().requires_grad_()
        optimizer = adamw([parameter], lr=lr, weight_decay=0.0, master_weights=master)
        for _ in range(32):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        results[master] = parameter.detach()
    assert torch.equal(results[False], start)
    torch.testing.assert_close(results[True].double(), start.double() - 32 * lr, rtol=0, atol=lr * 8)


@pytest.mark.parametrize("master_weights", [False, True])
def test_moments_stay_float32_through_a_state_dict(adamw, master_weights):
    straight = parameters_of(maker("bfloat16"), ((6,), (2, 3)))
    interrupted = twin(straight)
    first = adamw(straight, lr=0.1, master_weights=master_weights)
    second = adamw(interrupted, lr=0.1, master_weights=master_weights)
    make = maker("bfloat16", seed=1)
    take_steps([first, second], [straight, interrupted], make, 3)
    resumed = adamw(interrupted, lr=5.0, master_weights=master_weights)
    resumed.load_state_dict(second.state_dict())
    assert {state["exp_avg"].dtype for state in resumed.state.values()} == {torch.float32}
    take_steps([first, resumed], [straight, interrupted], make, 3)
    for one, other in zip(straight, interrupted, strict=True):
        assert torch.equal(one, other)


def test_state_moves_to_and_from_pytorch(adamw):
    ours, theirs = parameters_of(maker(), ((6,),)), parameters_of(maker(), ((6,),))
    first = torch.optim.AdamW(theirs, lr=0.1)
    take_steps([first], [theirs], maker(seed=1), 2)
    with torch.no_grad():
        ours[0].copy_(theirs[0])
    second = adamw(ours, lr=0.1)
    second.load_state_dict(first.state_dict())
    take_steps([first, second], [theirs, ours], maker(seed=2), 2)
    torch.testing.assert_close(ours[0], theirs[0])
    back = torch.optim.AdamW(ours, lr=0.1)
    back.load_state_dict(second.state_dict())
    take_steps([first, back], [theirs, ours], maker(seed=3), 2)
    torch.testing.assert_close(ours[0], theirs[0])


def test_tables_follow_gradients_that_move(adamw):
    """Tables are cached by address: new gradients at new addresses are found, old ones are not read."""
    parameter = torch.zeros(5, device=DEVICE, requires_grad=True)
    optimizer = adamw([parameter], lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    kept = []
    for sign in (1.0, -1.0, -1.0, 1.0):
        parameter.grad = torch.full((5,), sign, device=DEVICE)
        kept.append(parameter.grad)
        optimizer.step()
        assert (parameter == -sum(g[0] for g in kept)).all()


def test_autograd_sees_the_change(adamw):
    parameter = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = parameter.square().sum()
    parameter.grad = torch.ones_like(parameter)
    adamw([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_twice_the_same_bits(adamw):
    results = []
    for _ in range(2):
        parameters = parameters_of(maker())
        take_steps([adamw(parameters, max_l2_norm=0.5)], [parameters], maker(seed=1), 3)
        results.append(parameters)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_operator(clip, master_weights):
    from cs336_triton.adamw import update_operator

    make = maker("float16" if master_weights else "float32")
    parameters, gradients = [make.normal(3, 2), make.normal(5)], [make.normal(3, 2), make.normal(5)]
    wide = [[maker().normal(3, 2).abs(), maker().normal(5).abs()] for _ in range(3)]
    norm = torch.ones((), device=DEVICE) if clip else None
    masters = wide[2] if master_weights else []
    settings = (0.5, 1e-3, 0.9, 0.999, 1e-8, 0.01, 3)
    torch.library.opcheck(
        update_operator,
        (parameters, gradients, wide[0], wide[1], masters, norm, *settings),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"max_l2_norm": -1.0}, "max_l2_norm is -1.0"),
        ({"betas": (1.0, 0.9)}, "betas are"),
    ],
    ids=["lr", "max_l2_norm", "betas"],
)
def test_refused(adamw, keywords, message):
    with pytest.raises(ValueError, match=message):
        adamw(parameters_of(maker()), **keywords)


def test_sparse_gradients_are_refused(adamw):
    parameter = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    parameter.grad = torch.ones(3, 2, device=DEVICE).to_sparse()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        adamw([parameter]).step()
