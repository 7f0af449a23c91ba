"""The training loss without logits. It serves runs on a GPU; here it is computed, and chosen, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cs336_registry as registry
from cs336_registry.pipeline import fused_loss, process_group, training
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.resolved import Resolved, resolve


def chosen(configuration, device: str, group=None) -> Resolved:
    components = resolve(configuration.backend, device)
    return fused_loss.components_of(configuration, device, group or process_group.current(), components)


class Several:
    alone = False


@pytest.mark.parametrize(
    ("backend", "device", "group", "taken"),
    [
        ("torch", "cuda", None, True),
        ("torch", "cpu", None, False),
        ("torch", "cuda", Several(), False),
        ("reference", "cuda", None, False),
        ("torch,cross_entropy=reference", "cuda", None, False),
        ("torch,linear_cross_entropy=reference", "cuda", None, False),
    ],
)
def test_taken_on_a_gpu_by_one_process_where_one_backend_serves_both_losses(tiny, backend, device, group, taken):
    found = chosen(tiny(f"backend={backend}"), device, group)
    assert set(found.callables) == set(found.decisions) == ({"linear_cross_entropy"} if taken else set())


def served_by_torch() -> Resolved:
    return resolve("torch", "cpu", ("linear_cross_entropy",))


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_logits(tiny, precision, tolerance, tied):
    configuration = tiny(f"training.precision={precision}", f"model.tie_embeddings={str(tied).lower()}")
    torch.manual_seed(0)
    model = registry.get("transformer_lm", backend="torch")(33, 8, 16, 2, 2, 24, tie_embeddings=tied)
    inputs, targets = torch.randint(0, 33, (2, 3, 8)).unbind()
    parameters = list(model.parameters())

    def computed(loss_of) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(inputs, targets)
        return [loss.detach().float(), *(grad.float() for grad in torch.autograd.grad(loss, parameters))]

    plain = registry.get("cross_entropy", backend="torch")
    without_logits = fused_loss.from_hidden_states(model, served_by_torch(), configuration)
    found, expected = computed(without_logits), computed(lambda inputs, targets: plain(model(inputs), targets))
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


def test_a_model_of_another_kind_keeps_its_logits(tiny):
    assert fused_loss.from_hidden_states(torch.nn.Linear(2, 3), served_by_torch(), tiny()) is None


@pytest.mark.parametrize("more", [(), ("training.gradient_accumulation=2", "training.activation_checkpointing=true")])
def test_a_run_trains_as_with_logits_and_says_so(tiny, tmp_path, monkeypatch, more):
    configuration = tiny("backend=torch", "training.steps=4", "schedule.cosine_steps=12", *more)

    def losses(name: str) -> list[float]:
        training.train(configuration, tmp_path / name, progress=Progress(quiet=True))
        return [row["loss"] for row in of_kind(read_metrics(tmp_path / name / "metrics.jsonl"), "step")]

    expected = losses("logits")
    served, calls = served_by_torch(), []

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return served["linear_cross_entropy"](*arguments)

    counting = Resolved({"linear_cross_entropy": counted}, served.decisions)
    monkeypatch.setattr(fused_loss, "components_of", lambda *_: counting)
    np.testing.assert_allclose(losses("hidden"), expected, rtol=1e-5)
    assert len(calls) == 4 * configuration.training.gradient_accumulation
    record = (tmp_path / "hidden" / "run.json").read_text()
    assert "linear_cross_entropy" in record and "linear_cross_entropy" not in (tmp_path / "logits/run.json").read_text()
