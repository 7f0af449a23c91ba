"""Distributed training on two gloo ranks, with models as the course's assignment 2 has them."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from cs336_registry.ranks import run_on_ranks

from .support import normal


class Toy(torch.nn.Module):
    """Linear layers, a norm, and a parameter that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(10, 10, bias=False), torch.nn.LayerNorm(10)
        self.middle, self.last = torch.nn.Linear(10, 50), torch.nn.Linear(50, 5)
        self.fixed = torch.nn.Parameter(torch.tensor([2.0, 2.0]), requires_grad=False)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.norm(self.first(x))))))


class TiedToy(torch.nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = torch.nn.Linear(10, 50), torch.nn.Linear(50, 10)
        self.second, self.last = torch.nn.Linear(10, 50), torch.nn.Linear(50, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.down(torch.relu(self.first(x)))))))


def built(model_class, rank=0):
    torch.manual_seed(rank)
    return model_class()


def batches(steps=5):
    return [(normal(20, 10, seed=step), normal(20, 5, seed=step + 50)) for step in range(steps)]


def trained_alone(model_class):
    model = built(model_class)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def trained_together(rank, wrap, model_class, compute_dtype=None):
    """Each rank starts from weights of its own and sees half of each batch; rank 0's weights must win."""
    wrapped = wrap(built(model_class, rank), *([compute_dtype] if compute_dtype else []))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(wrapped(x[rank * 10 :][:10]), y[rank * 10 :][:10]).backward()
        wrapped.finish_gradient_synchronization()
        optimizer.step()
    gather = getattr(wrapped, "gather_full_parameters", wrapped.module.state_dict)
    return {name: tensor.detach().clone() for name, tensor in gather().items()}


@pytest.mark.parametrize("model_class", [TiedToy, Toy], ids=lambda model_class: model_class.__name__)
def test_ddp_equals_one_process(implementation_of, model_class):
    expected = trained_alone(model_class)
    for state in run_on_ranks(trained_together, implementation_of("ddp"), model_class):
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_class", [TiedToy, Toy], ids=lambda model_class: model_class.__name__)
def test_fsdp_equals_one_process(implementation_of, claims_of, model_class, compute_dtype):
    fsdp = implementation_of("fsdp")
    needed = {"tied_weights"} if model_class is TiedToy else {"frozen_weights"}
    needed |= {"compute_dtype"} if compute_dtype else set()
    claims_of("fsdp", needed)
    expected = trained_alone(model_class)
    tolerance = {"rtol": 0.05, "atol": 0.02} if compute_dtype else {}
    for state in run_on_ranks(trained_together, fsdp, model_class, compute_dtype):
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            assert state[name].dtype == torch.float32
            torch.testing.assert_close(state[name], tensor, **tolerance)


@pytest.fixture
def claims_of(cs336_backend):
    """Skips a test that needs features which the backend does not claim."""
    from cs336_registry.conformance.subject import find

    def need(component, features):
        claims = find(cs336_backend, component).claims
        lacking = sorted(set(features) - set(claims.features if claims else ()))
        if lacking:
            pytest.skip(f"{cs336_backend} does not claim {', '.join(lacking)} for {component}")

    return need


def steps_of(rank, sharded_optimizer, optimizer_class):
    """Both optimizers on the same gradients, rank by rank."""
    plain, model = built(TiedToy), built(TiedToy)
    settings = {"lr": 0.1, "weight_decay": 0.1}
    expected = optimizer_class(plain.parameters(), **settings)
    found = sharded_optimizer(model.parameters(), optimizer_class, **settings)
    for x, y in batches(10):
        for one, optimizer in ((plain, expected), (model, found)):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(one(x), y).backward()
            optimizer.step()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, name=name: f"{name}: {text}")
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_sharded_optimizer_equals_a_plain_one(implementation_of, optimizer_class):
    run_on_ranks(steps_of, implementation_of("sharded_optimizer"), optimizer_class)


class Embedding(torch.nn.Module):
    """A stranger's layer, whose result is a view."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, width))

    def forward(self, ids):
        return self.weight[ids.flatten()].view(*ids.shape, -1)


class Linear(Embedding):
    def forward(self, x):
        return (x.flatten(0, -2) @ self.weight.T).view(*x.shape[:-1], -1)


class InPlace(torch.nn.Module):
    """Changes those views in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = Embedding(10, 8), Linear(8, 8), Linear(5, 8)

    def forward(self, ids):
        x = self.embedding(ids)
        x += 1.0
        x = self.first(x).relu_()
        return self.last(x)


def gradients_of_in_place(rank, fsdp):
    model = built(InPlace)
    wrapped = fsdp(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(torch.arange(8).view(2, 4) + rank).square().mean().backward()
    wrapped.finish_gradient_synchronization()
    whole = (parameter.grad for parameter in model.parameters())
    return [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in whole]


def test_fsdp_of_layers_whose_results_are_views_changed_in_place(implementation_of):
    model = built(InPlace)
    for rank in range(2):
        (model(torch.arange(8).view(2, 4) + rank).square().mean() / 2).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for rank, found in enumerate(run_on_ranks(gradients_of_in_place, implementation_of("fsdp"))):
        for gradient, whole in zip(found, expected, strict=True):
            part = whole if len(gradient) == len(whole) else whole.chunk(2)[rank]
            torch.testing.assert_close(gradient, part)


# What follows is about the reference's own way of doing it.


def communication(rank, wrap):
    """What was sent before backward ended, and what only then."""
    calls = []
    all_reduce = dist.all_reduce

    def watched(tensor, *arguments, **options):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *arguments, **options)

    wrapped = wrap(built(TiedToy))
    dist.all_reduce = watched
    try:
        wrapped(normal(4, 10)).sum().backward()
        during = list(calls)
        wrapped.finish_gradient_synchronization()
    finally:
        dist.all_reduce = all_reduce
    return during, calls[len(during) :]


def test_reference_ddp_communicates_during_backward_and_shared_weights_once():
    from cs336_reference.ddp import DistributedDataParallel

    for during, after in run_on_ranks(communication, DistributedDataParallel):
        shapes = [tuple(parameter.shape) for parameter in TiedToy().parameters()]
        assert sorted(during) == sorted(shapes), "every gradient is sent once, while backward runs"
        assert after == [(len(shapes),)], "at the end only the count of users is sent"


def whole_weights_alive(rank, wrap):
    """Bytes of parameters that stay, and the largest tensor that autograd keeps between forward and backward."""
    wrapped = wrap(torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(4))))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t)
    with hooks:
        loss = wrapped(normal(2, 64)).sum()
    loss.backward()
    wrapped.finish_gradient_synchronization()
    return sum(parameter.numel() for parameter in wrapped.parameters()), max(kept, default=0)


def test_reference_fsdp_keeps_half_and_drops_whole_weights_between_forward_and_backward():
    from cs336_reference.fsdp import FullyShardedDataParallel

    for stays, largest_kept in run_on_ranks(whole_weights_alive, FullyShardedDataParallel):
        assert stays == 4 * 64 * 64 / 2
        assert largest_kept < 64 * 64


def accumulated(rank, wrap):
    """Two backward passes and then one synchronisation, as gradient accumulation does it."""
    wrapped = wrap(built(Toy))
    for x, _ in batches(2):
        wrapped(x[rank * 10 :][:10]).square().mean().backward()
    wrapped.finish_gradient_synchronization()
    gather = wrapped.module.named_parameters()
    return {name: tensor.grad for name, tensor in gather if tensor.grad is not None}


def test_reference_ddp_accumulates_gradients():
    from cs336_reference.ddp import DistributedDataParallel

    model = built(Toy)
    for x, _ in batches(2):
        model(x).square().mean().backward()
    expected = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    for found in run_on_ranks(accumulated, DistributedDataParallel):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def fails(rank):
    if rank == 1:
        raise ValueError("rank 1 has a bad day")
    dist.barrier()


def ranks_of(rank, value):
    total = torch.tensor([rank + value])
    dist.all_reduce(total)
    return rank, int(total)


def test_a_failing_rank_is_reported_and_the_next_run_works():
    with pytest.raises((RuntimeError, ValueError), match=r"rank 1 has a bad day|onnection"):
        run_on_ranks(fails)
    assert run_on_ranks(ranks_of, 10) == [(0, 21), (1, 21)]
