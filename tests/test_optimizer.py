"""Area "optimizer": AdamW against torch.optim.AdamW, in float64 over many steps, and the learning-rate schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .support import device_of, normal, properties, skip_without_float64

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def device(cs336_backend):
    return device_of(cs336_backend, "adamw")


def model_and_target(device, dtype=torch.float32):
    model = torch.nn.Linear(3, 2, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(normal(2, 3, device=device, dtype=dtype))
    return model, torch.tensor([[1.0, -2.0, 3.0]], device=device, dtype=dtype)


def train(optimizer_class, steps, device, dtype=torch.float32, **settings):
    """Weights after `steps` steps that pull the outputs towards the sum of seeded inputs."""
    model, scale = model_and_target(device, dtype)
    optimizer = optimizer_class(model.parameters(), **settings)
    for step in range(steps):
        x = normal(4, 3, seed=step, device=device, dtype=dtype)
        optimizer.zero_grad()
        ((model(x) - (x * scale).sum(-1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()
    return model.weight.detach()


def test_adamw_matches_pytorch_over_a_thousand_steps(implementation_of, device):
    found = train(implementation_of("adamw"), 1000, device, **SETTINGS)
    truth = train(torch.optim.AdamW, 1000, "cpu", torch.float64, **SETTINGS)
    baseline = train(torch.optim.AdamW, 1000, "cpu", **SETTINGS)
    error, plain = (float((one.cpu().double() - truth).abs().max()) for one in (found, baseline))
    assert error <= 4 * plain + 1e-5, f"error {error}, PyTorch's own in float32 is {plain}"


def test_adamw_in_float64(implementation_of, cs336_backend, device):
    adamw = implementation_of("adamw")
    skip_without_float64(cs336_backend, "adamw")
    found = train(adamw, 200, device, torch.float64, **SETTINGS)
    expected = train(torch.optim.AdamW, 200, "cpu", torch.float64, **SETTINGS)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-12)


def test_adamw_decays_before_the_step(implementation_of, device):
    """With one parameter, one gradient and eps = 0 the first step is known: p (1 - lr·λ) - lr · sign(g)."""
    parameter = torch.nn.Parameter(torch.tensor([10.0], device=device))
    parameter.grad = torch.tensor([3.0], device=device)
    implementation_of("adamw")([parameter], lr=0.5, weight_decay=0.1, eps=0.0).step()
    assert float(parameter.detach()) == pytest.approx(10 * 0.95 - 0.5, rel=1e-6)


def test_adamw_state_dicts_move_to_pytorch_and_back(implementation_of, device):
    adamw = implementation_of("adamw")

    def continued(first, second):
        model, _ = model_and_target(device)
        optimizer = first(model.parameters(), **SETTINGS)
        for step in range(6):
            if step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = second(model.parameters(), lr=1.0)
                optimizer.load_state_dict(state)
            model.weight.grad = normal(2, 3, seed=step, device=device)
            optimizer.step()
        return model.weight.detach()

    expected = continued(torch.optim.AdamW, torch.optim.AdamW)
    torch.testing.assert_close(continued(adamw, torch.optim.AdamW), expected)
    torch.testing.assert_close(continued(torch.optim.AdamW, adamw), expected)


def test_adamw_takes_schedulers_and_new_groups(implementation_of, device):
    found = []
    for optimizer_class in (implementation_of("adamw"), torch.optim.AdamW):
        one, other = (torch.nn.Parameter(normal(3, seed=seed, device=device)) for seed in (0, 1))
        optimizer = optimizer_class([one], **SETTINGS)
        optimizer.add_param_group({"params": [other], "weight_decay": 0.0})
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(5):
            one.grad, other.grad = normal(3, seed=step + 10, device=device), normal(3, seed=step + 20, device=device)
            optimizer.step()
            scheduler.step()
        found.append(torch.cat([one, other]).detach())
    torch.testing.assert_close(*found)


@properties
@given(lr=st.floats(1e-5, 1.0), beta=st.floats(0, 0.99), decay=st.floats(0, 0.5), seed=st.integers(0, 1000))
def test_adamw_matches_pytorch_for_any_settings(implementation_of, device, lr, beta, decay, seed):
    found = []
    for optimizer_class in (implementation_of("adamw"), torch.optim.AdamW):
        parameter = torch.nn.Parameter(normal(4, 3, seed=seed, device=device))
        optimizer = optimizer_class([parameter], lr=lr, betas=(beta, beta), weight_decay=decay)
        for step in range(3):
            parameter.grad = normal(4, 3, seed=seed + step + 1, device=device)
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
    ids=["betas", "eps", "lr", "weight_decay"],
)
def test_adamw_refuses_bad_settings(implementation_of, device, settings, message):
    with pytest.raises(ValueError, match=message):
        implementation_of("adamw")([torch.nn.Parameter(torch.ones(2, device=device))], **settings)


def test_schedule_of_the_course(implementation_of):
    """Peak 1, floor 0.1, 7 iterations of warm-up, 21 in all: the values follow from the formula by hand."""
    schedule = implementation_of("lr_cosine_schedule")
    found = [schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    warmup = [it / 7 for it in range(7)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 14)) for step in range(15)]
    assert found == pytest.approx([*warmup, *cosine, 0.1, 0.1, 0.1], rel=1e-12)
    assert found[7] == 1.0 and found[14] == pytest.approx(0.55) and found[21] == pytest.approx(0.1)


@properties
@given(it=st.integers(0, 300), warmup=st.integers(0, 100), cosine=st.integers(0, 100), low=st.floats(0, 1))
def test_schedule_stays_between_zero_and_the_peak(implementation_of, it, warmup, cosine, low):
    rate = implementation_of("lr_cosine_schedule")(it, 1.0, low, warmup, warmup + cosine)
    assert 0 <= rate <= 1
    assert it < warmup or rate >= low * (1 - 1e-12)
    assert it <= warmup + cosine or rate == low


def test_schedule_refuses_a_warmup_beyond_the_cycle(implementation_of):
    with pytest.raises(ValueError, match="warmup_iters is 8 but cosine_cycle_iters is 7"):
        implementation_of("lr_cosine_schedule")(0, 1.0, 0.1, 8, 7)
