"""Loss and gradients as one recorded graph of operations, for networks too small to wait for Python.

For a network of a few thousand weights, most of an update's time goes into Python and autograd's records,
which are the same in every update. Recorded once, the same operations run from TorchScript's interpreter, in
the same order and with the same results, bit for bit.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from diffusion.training.flat_parameters import FlatParameters
from diffusion.training.loss import BatchLoss, DenoisingLoss


class TracedLoss:
    """The loss of a network on batches of one shape, with the gradients of its weights.

    Args:
        loss: the training loss.
        network: the network in training, on the CPU. For all inputs of a shape it must call the same
            operations, as networks say by an attribute `static_graph`.
        weights: its weights.
        batch: arguments of `loss` after the network, of the shapes of all batches; None is left out.
    """

    def __init__(
        self,
        loss: DenoisingLoss,
        network: nn.Module,
        weights: FlatParameters,
        batch: Sequence[Tensor | None],
    ) -> None:
        self._detached = [weight.detach() for weight in network.parameters() if weight.requires_grad]
        names = [name for name, weight in network.named_parameters() if weight.requires_grad]
        given = [number for number, each in enumerate(batch) if each is not None]

        def compute(*inputs: Tensor) -> list[Tensor]:
            leaves = [each.detach().requires_grad_() for each in inputs[len(given) :]]
            arguments: list[Tensor | None] = [None] * len(batch)
            for number, each in zip(given, inputs, strict=False):
                arguments[number] = each

            def with_weights(*arguments: Tensor, **named: Tensor) -> Tensor:
                return functional_call(network, dict(zip(names, leaves, strict=True)), arguments, named)

            result = loss(with_weights, *arguments)  # type: ignore[arg-type]
            gradients = weights.join(torch.autograd.grad(result.loss, leaves))
            return [result.loss, result.mse, result.error, *gradients]

        inputs = [*self._given(batch), *self._detached]
        with torch.random.fork_rng([]):  # recording computes, and may draw dropout
            with torch.no_grad():
                loss(network, *batch)  # type: ignore[arg-type]  # makes what is kept for later batches
            graph = make_fx(compute)(*inputs)
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten.detach.default:
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
            elif isinstance(node.target, torch._ops.OpOverload):
                node.target = node.target.overloadpacket  # as TorchScript names operations
        graph.recompile()
        with warnings.catch_warnings():
            # TorchScript's replacement compiles for longer than a training of such a network takes.
            warnings.simplefilter("ignore")
            self._run = torch.jit.script(graph)

    @torch.no_grad()
    def __call__(self, *batch: Tensor | None) -> tuple[BatchLoss, list[Tensor]]:
        """The loss of a batch, to which no backward pass leads, and the gradients as `weights` joins them."""
        loss, mse, error, *gradients = self._run(*self._given(batch), *self._detached)
        return BatchLoss(loss, mse, error), gradients

    @staticmethod
    def _given(batch: Sequence[Tensor | None]) -> list[Tensor]:
        return [each for each in batch if each is not None]
