"""Decoding token by token, on a GPU as replays of one captured step: a step is hundreds of small launches otherwise."""

import torch
from torch import Tensor

from megatron_taipan.inference.adjacent import make_adjacent
from megatron_taipan.model.cache import Cache
from megatron_taipan.model.taipan import Taipan

EAGER_STEPS = 2  # before a capture: they compile kernels and make cuBLAS's workspaces


class Stepper:
    """Extends a cache by one token a row at a time; on a GPU through a CUDA graph, which gives the same logits.

    The graph is captured again where the cache's tensors are not those of before: after a prefill, after rows left,
    after an unbounded buffer grew. So it is where the weights moved: the model was cast or put elsewhere, its
    parameters were replaced, or a later Stepper moved them. Its memory is that of one step's intermediate results.

    Args:
        captured: False: every step is launched kernel by kernel, also on a GPU.
    """

    def __init__(self, model: Taipan, cache: Cache, *, captured: bool = True):
        self.model, self.cache = model, cache
        self.captured = captured and model.embedding.weight.is_cuda
        if self.captured:
            self._arrange_weights()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: list[Tensor | None] = []  # what the graph, or the next one, reads and writes
        self.eager_steps = 0  # since `held` changed
        self.tokens: Tensor | None = None  # [b, 1] the graph's input
        self.logits: Tensor | None = None  # [b, vocab] and its output

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [b, vocab] after tokens [b, 1]; a later step may overwrite them."""
        self.cache.advance()
        if not self.captured:
            return self.model.step_on_device(tokens, self.cache)
        tensors = self.cache.tensors()
        if self._weights_moved():
            self._arrange_weights()
            self.held = []
        if len(tensors) != len(self.held) or any(a is not b for a, b in zip(tensors, self.held, strict=True)):
            self.held, self.eager_steps, self.graph = tensors, 0, None
        if self.graph is None:
            if self.eager_steps < EAGER_STEPS:
                self.eager_steps += 1
                return self.model.step_on_device(tokens, self.cache)
            self._capture(tokens)
        assert self.graph is not None and self.tokens is not None and self.logits is not None  # by `_capture`
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def _arrange_weights(self) -> None:
        """Moves together what a step reads together, and notes where the weights are."""
        if self.model.graphs is None and make_adjacent(self.model):  # graphs of training read frozen weights too
            self.model.weight_moves += 1
        # kept, so that nothing else can get its address
        self.embedding, self.weight_moves = self.model.embedding.weight.data, self.model.weight_moves

    def _weights_moved(self) -> bool:
        """Of what moves all weights at once the embedding tells; to ask each would take longer than the launch."""
        at = self.model.embedding.weight.data_ptr()
        return self.weight_moves != self.model.weight_moves or at != self.embedding.data_ptr()

    def _capture(self, tokens: Tensor) -> None:
        """Records a step without running it."""
        self.tokens, graph = tokens.clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.logits = self.model.step_on_device(self.tokens, self.cache)
        self.graph = graph
