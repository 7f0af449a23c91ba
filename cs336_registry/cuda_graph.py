"""Work on a GPU captured once as a CUDA graph and replayed: Python and the libraries are asked only the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as a CUDA graph: what it does on the card is replayed, and its result lies in the graph's memory.

    Whatever `call` runs backward must have been run forward on the stream that is current here, if that is not the
    default stream. Raises RuntimeError where `call` can't be captured, say because it waits for the card.
    """
    import torch

    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay(inputs: Any = call) -> Any:
        # The graph reads the memory of what `call` refers to, which must live as long.
        graph.replay()
        return result

    return replay


class CapturedPass:
    """A forward and backward pass over a batch, captured with the first one and replayed with the others.

    `loss_of(inputs, targets)` is what is differentiated. A call leaves the gradients of `parameters` in their `grad`,
    in the graph's memory, and returns the loss; all batches must have the first one's shapes.
    """

    def __init__(self, loss_of: Callable[[Any, Any], Any], parameters: list[Any]) -> None:
        self._loss_of, self._parameters = loss_of, parameters
        self._replay: Callable[[], Any] | None = None

    def __call__(self, inputs: Any, targets: Any) -> Any:
        if self._replay is None:
            self._inputs, self._targets = inputs.clone(), targets.clone()
            self._replay = captured(self._differentiate)
            self._gradients = [parameter.grad for parameter in self._parameters]
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        loss = self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    def _differentiate(self) -> Any:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._loss_of(self._inputs, self._targets)
        loss.backward()
        return loss.detach()
