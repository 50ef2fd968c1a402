"""Token log-probs of a linear head that never form the logits of all tokens (formulas: `oracle`)."""

from __future__ import annotations

import torch

from ... import _native, dispatch, memory
from ..._fork import one_thread_after_fork
from ..._library import no_autocast, refuse_transforms
from ..._spec_base import as_int, check_int
from .._checks import check_floating, check_plain
from . import chunks, ops
from .contract import OnDlogits, OnGradient, Settings, Weigh, check_softcap, check_temperature


def linear_logprob(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``log softmax(cap(hidden head^T + bias) / temperature)[targets]``, differentiable with respect to ``hidden``.

    The backward pass computes the logits again, chunk by chunk, and only for tokens whose gradient is not 0; where
    the weights of the tokens are known before the backward pass, `logprob_and_grad` saves that product.

    >>> linear_logprob(torch.zeros(2, 4), torch.zeros(10, 4), torch.tensor([3, -100]))  # log(1/10); ignored
    tensor([-2.3026,  0.0000])

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64, any strides.
        head: [V, D], dtype and device of ``hidden``. Its gradient is never formed here: pass ``head.detach()`` if it is
            trainable, and sketch its gradient from the chunks of `logprob_and_grad`.
        targets: int64 [N], in [0, V) or ``ignore_index``.
        bias: [V] or None, no gradient either.
        temperature: > 0; divides the logits after the soft-cap, as samplers do.
        softcap: > 0 (Gemma-2: 30) or None: logits become ``softcap * tanh(logits / softcap)``.
        ignore_index: target of tokens that do not count: log-prob 0, no gradient; no cost on a CPU (a GPU
            computes them: it could not leave them out without the host waiting for it).
        return_entropy: also return the entropy of each distribution, without a gradient.
        chunk_size: tokens whose logits exist at one time; default: about 24 MiB of logits, 96 tokens at least (on a
            GPU: 1 GiB).
        backend: "triton" (GPU, around the vendor's GEMM), "cpu" (C++), "reference" (plain torch, same memory promise),
            or None for the best that serves.

    Returns:
        log-probs [N], or (log-probs, entropies): float32 always, float64 for float64 input. Products are summed in
        float32 whatever the input's dtype. A token with NaN in its hidden state gets NaN and leaves the others right.

    Raises:
        ValueError: names the argument, its value and the remedy; a target out of range by its index and value.
        RuntimeError: the backend that was named cannot serve the call; a derivative in forward mode, under
            `torch.func`, or a second one is asked for.
    """
    settings = _checked(hidden, head, targets, bias, temperature, softcap, ignore_index, chunk_size, backend)
    refuse_transforms("linear_logprob", hidden=hidden, head=head, bias=bias)
    if torch.is_grad_enabled():
        for given, tensor in (("head", head), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{given} requires a gradient, which linear_logprob never forms: pass {given}.detach(), and take "
                    "the head's gradient from the on_dlogits chunks of logprob_and_grad"
                )
    logp, _, _, entropy = torch.ops.cropi.linear_logprob(
        hidden, head, targets, bias, return_entropy, *settings
    )
    return (logp, entropy) if return_entropy else logp


@torch.no_grad()
def logprob_and_grad(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weigh: Weigh,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    on_dlogits: OnDlogits | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs and the gradient of ``sum_n w_n logp_n`` in one pass: each chunk's logits are computed once.

    The weights may depend on the log-probs (importance ratios, clipping): they are asked for chunk by chunk, between
    the two uses of the logits.

    >>> hidden, head, targets = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([1, 7, 2])
    >>> advantage = torch.tensor([1.0, 1.0, -0.5])
    >>> logp, grad, weights = logprob_and_grad(hidden, head, targets, lambda logp, start, stop: advantage[start:stop])
    >>> logp.shape, grad.shape, torch.equal(weights, advantage)
    (torch.Size([3]), torch.Size([3, 8]), True)

    Arguments as in `linear_logprob`, and:

    Args:
        weigh: ``weigh(logp, start, stop)`` gives the weights of tokens start..stop as a tensor of stop - start numbers.
            Tokens with ``ignore_index`` are passed with log-prob 0 and have no gradient whatever their weight; only
            where the head itself holds infinity is theirs NaN, as that of every token is, and as in plain torch.
        on_dlogits: ``on_dlogits(start, stop, dz)`` may read ``dz`` [stop - start, V], the gradient of the logits before
            the soft-cap: float32 (on a GPU: the head's dtype), contiguous columns, strided rows, valid during the call
            only.

    Returns:
        log-probs float32 [N]; gradient to ``hidden`` [N, D] in its dtype; weights float32 [N]. For float64 input all
        are float64, ``dz`` too.

    Raises:
        ValueError: as `linear_logprob`, and where ``weigh`` returns another number of weights than it was asked for.
    """
    on_gradient = (
        None if on_dlogits is None else lambda start, stop, gradient: on_dlogits(start, stop, gradient.dz)
    )
    return logprob_and_grad_of(
        hidden, head, targets, weigh, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        chunk_size=chunk_size, backend=backend, on_gradient=on_gradient, whole=on_dlogits is not None,
    )  # fmt: skip


@torch.no_grad()
def logprob_and_grad_of(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weigh: Weigh,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: str | None = None,
    on_gradient: OnGradient | None = None,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logprob_and_grad` whose callback gets the gradient of the logits as rows and, unless ``whole``, factors."""
    settings = _checked(hidden, head, targets, bias, temperature, softcap, ignore_index, chunk_size, backend)

    def checked(logp: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        weights = weigh(logp, start, stop)
        if not isinstance(weights, torch.Tensor) or tuple(weights.shape) != (stop - start,):
            shape = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
            raise ValueError(
                f"weigh(logp, {start}, {stop}) returned {shape}: return a tensor of {stop - start} weights"
            )
        check_plain(f"weigh(logp, {start}, {stop})", weights)
        return _native.aligned(weights.detach())

    with memory.explained("logprob_and_grad", ops.REMEDY, hidden, head):
        call = ops.prepare(hidden, head, targets, bias, settings)
        with no_autocast(hidden):
            return chunks.one_pass(_native.aligned(hidden.detach()), call, checked, on_gradient, whole)


def _checked(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    chunk_size: int | None,
    backend: str | None,
) -> Settings:
    """Everything that shapes and numbers alone decide, so that it also runs while a graph is traced."""
    one_thread_after_fork()
    check_floating("hidden", hidden)
    for name, x in (("head", head), ("targets", targets), ("bias", bias)):
        if x is not None:
            check_plain(name, x)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: give [N, D], hidden.reshape(-1, hidden.shape[-1])"
        )
    if head.ndim != 2 or head.shape[1] != hidden.shape[1] or head.shape[0] < 1:
        raise ValueError(
            f"head has shape {tuple(head.shape)}: give [V, {hidden.shape[1]}] (hidden is {tuple(hidden.shape)})"
        )
    if head.dtype != hidden.dtype or head.device != hidden.device:
        raise ValueError(
            f"head is {head.dtype} on {head.device}, hidden is {hidden.dtype} on {hidden.device}: move one to the other"
        )
    if targets.ndim != 1 or targets.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}: give one target per token, [{hidden.shape[0]}]"
        )
    if targets.dtype != torch.int64 or targets.device != hidden.device:
        raise ValueError(f"targets is {targets.dtype} on {targets.device}: give int64 on {hidden.device}")
    if bias is not None and (tuple(bias.shape) != (head.shape[0],) or bias.device != head.device):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} on {bias.device}: give [{head.shape[0]}] on {head.device}"
        )
    check_temperature(temperature)
    if softcap is not None:
        check_softcap(softcap)
    tokens = 0 if chunk_size is None else as_int(chunk_size, 1, 1 << 62)
    if tokens is None:
        raise ValueError(f"chunk_size={chunk_size}: give at least 1 token, or None for the default")
    ignored = check_int("ignore_index", ignore_index, -(1 << 63), (1 << 63) - 1)
    return Settings(float(temperature), float(softcap or 0.0), ignored, tokens, dispatch.checked(backend))
