"""Whether a model computes the same in the two layouts: tried on rows as long as those that are used.

What depends on the place in the row, and not on position ids and mask alone, shows only where the row is long enough:
a local window (GPT-Neo), a scale that grows with the row's index (Llama 4), ALiBi, the state of a convolution or a scan
that runs on from one response into the next. So the layouts are tried on a dozen made-up tokens, and again on every row
of the job that is longer than those tried before, or whose last response is further from the prompt. In exact
arithmetic:

- *the same as alone*: a response in a shared row has the hidden states that it has behind the prompt in its own row;
- *the same whatever the neighbours*: they do not change when other tokens stand in the other responses.

A model in half precision is tried in float32, layer by layer (:func:`in_float32`): a convolution that runs on from one
response into the next changed 5 % of a hidden state, where bfloat16 rounds 3 % of it away.

**The tolerance** is measured, since rounding grows from layer to layer in a way that each model has for itself: the
response alone once more, with the output of every module with weights moved by one unit in the last place, up or down.
The layouts differ by less than that: they sum attention in another order, and nothing else. A token's difference is
relative to the size of its hidden state; three quarters of the tokens of a response may differ by :data:`MEDIUM` times
what they differ by under that change, and none by more than :data:`LARGEST` times the most that a token does (routers
that flip). A neighbour's tokens come in by a leak alone: no token may differ by more than :data:`LEAK` times that most.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cropi.gradient.masks import handed, prefix_mask
from cropi_kernels.sketcher.batch.inputs import model_inputs
from cropi_kernels.sketcher.model.hooks import hooked
from cropi_kernels.sketcher.model.precision import own_precision, product_eps
from cropi_kernels.sketcher.model.untouched import evaluating
from cropi_kernels.sketcher.policy.decoder import split_parts

MEDIUM, LARGEST, LEAK = 4.0, 64.0, 2.0


class LayoutTrial:
    """Tries a model, and remembers the longest row and the furthest response that passed, or why none may be shared."""

    def __init__(self, model: Any) -> None:
        self.model, self.problem = model, ""
        self.longest = self.furthest = 0

    def passes(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> bool:
        """Whether the model computes the same for this row in both layouts; a longer one that passed vouches for it.

        Args:
            prompt, responses: token ids of the row, in its order.
        """
        # A response of a single token is predicted from the prompt, and is never an input.
        responses = [ids for ids in responses if len(ids)]
        length, distance = len(prompt) + sum(map(len, responses)), sum(map(len, responses[:-1]))
        if responses and not self.problem and (length > self.longest or distance > self.furthest):
            self.problem = self._problem(list(prompt), [list(ids) for ids in responses])
            self.longest, self.furthest = max(length, self.longest), max(distance, self.furthest)
        return not self.problem

    @torch.no_grad()
    def takes_added(self, prompt: list[int], responses: list[list[int]]) -> torch.dtype | None:
        """The dtype of an additive mask that gives the same bits as the bool one; None: there is none.

        It is tried where torch's attention would make one of each bool mask, in the dtype that most weights have.
        """
        if getattr(self.model.config, "_attn_implementation", None) != "sdpa":
            return None
        sizes: Counter[torch.dtype] = Counter()
        for p in self.model.parameters():
            sizes[p.dtype] += p.numel() if p.is_floating_point() else 0
        (dtype, _), *_ = sizes.most_common(1)
        with evaluating(self.model), own_precision(self.model):
            try:
                made = self._shared(prompt, responses, dtype)
            except (TypeError, ValueError, RuntimeError):  # its attention computes in another dtype
                return None
            same = all(map(torch.equal, made, self._shared(prompt, responses)))
        return dtype if same else None

    @torch.no_grad()
    def _problem(self, prompt: list[int], responses: list[list[int]]) -> str:
        size = self.model.get_input_embeddings().weight.shape[0]
        others = [[(token + 1 + t % 7) % size for t, token in enumerate(ids)] for ids in responses[:-1]]
        with evaluating(self.model), own_precision(self.model), self._wide(prompt):
            try:
                together = self._shared(prompt, responses)
                changed = self._shared(prompt, [*others, responses[-1]])[-1]
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                return (
                    f"the model does not take a 4-D mask and position_ids ({type(error).__name__}: {error})"
                )
            for k in sorted({0, len(responses) // 2, len(responses) - 1}):
                alone = self._hidden([prompt + responses[k]])[len(prompt) :]
                with one_unit_off(self.model):
                    moved = self._hidden([prompt + responses[k]])[len(prompt) :]
                change = difference(together[k], alone)
                # Softmax and rotations are float32 in a float64 model, too.
                noise = difference(moved, alone).clamp_min(torch.finfo(torch.float32).eps)
                if excess(change, noise):
                    return self._message(prompt, responses, change, noise, "when responses share a row")
        change = difference(changed, together[-1])
        if bool(change.max() > LEAK * noise.max()):
            return self._message(
                prompt, responses, change, noise, "with the tokens of other responses in its row"
            )
        return ""

    @contextlib.contextmanager
    def _wide(self, prompt: list[int]) -> Iterator[None]:
        """Float32 for a model in half precision, if it runs like that."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(in_float32(self.model))
            try:
                self._hidden([prompt[:4]])
            except RuntimeError:  # the model's code fixes a dtype, or uses a weight outside of its module
                stack.close()
            yield

    def _message(
        self,
        prompt: list[int],
        responses: list[list[int]],
        change: torch.Tensor,
        noise: torch.Tensor,
        when: str,
    ) -> str:
        config = self.model.config
        kind = getattr(config, "_attn_implementation", "?")
        return (
            f"its output changes by up to {float(change.max()):.1%} {when} (model type {config.model_type!r}, "
            f"attention {kind!r}, {len(prompt)} + {sum(map(len, responses))} tokens; rounding: "
            f"{float(noise.max()):.1g}), so its layers do not follow a custom mask and position_ids"
        )

    def _shared(
        self, prompt: list[int], responses: list[list[int]], added: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        sizes, device = [len(ids) for ids in responses], self._device
        blocks = [0] * len(prompt) + [k for k, n in enumerate(sizes, 1) for _ in range(n)]
        places = [*range(len(prompt)), *(len(prompt) + t for n in sizes for t in range(n))]
        mask = prefix_mask(torch.tensor([blocks], device=device))
        row = [*prompt, *(token for ids in responses for token in ids)]
        where = torch.tensor([places], device=device)
        hidden = self._hidden([row], **model_inputs(self.model, handed(mask, added), where, None))
        return list(hidden[len(prompt) :].split(sizes))

    def _hidden(self, ids: list[list[int]], **inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[tokens, n]`` of the decoder, or logits where a model does not come apart."""
        tokens = torch.tensor(ids, device=self._device)
        try:
            split = split_parts(self.model)
        except ValueError:
            return torch.as_tensor(self.model(input_ids=tokens, use_cache=False, **inputs).logits[0])
        return split.hidden(tokens, **inputs)[0]

    @property
    def _device(self) -> torch.device:
        return torch.device(self.model.get_input_embeddings().weight.device)


def difference(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The difference of each token's hidden states, relative to their size: float64 ``[tokens]``; infinite where one of
    the two is not finite."""
    got, expected = got.double(), expected.double()
    both = got.isnan() & expected.isnan()
    off = (got - expected).masked_fill(both, 0.0).norm(dim=-1)
    size = expected.masked_fill(both, 0.0).norm(dim=-1)
    return (off / size.clamp_min(1e-300)).masked_fill(off == 0, 0.0).nan_to_num(torch.inf, torch.inf)


def excess(change: torch.Tensor, noise: torch.Tensor) -> bool:
    """Whether ``change`` is more than rounding, of which ``noise`` is a measure; both ``[tokens]``."""
    if not bool(noise.isfinite().all()):
        return not bool(change.isfinite().all())  # a model that has diverged: there is nothing to compare
    medium = change.quantile(0.75) > MEDIUM * noise.quantile(0.75)
    return bool(medium | (change.max() > LARGEST * noise.max()))


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Layers compute in float32 on the weights as they are: each layer's weights are widened while it runs.

    Embeddings look up in their own dtype, and hand on float32.
    """
    swapped: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, args: Any) -> None:
        for p in module.parameters():
            if p.dtype in (torch.float16, torch.bfloat16) and p not in swapped:
                swapped[p] = p.data
                p.data = p.data.float()

    def restore(module: torch.nn.Module, args: Any, output: Any) -> None:
        for p in module.parameters():
            if p in swapped:
                p.data = swapped.pop(p)

    def hand_on(module: torch.nn.Module, args: Any, output: Any) -> Any:
        return output.float() if isinstance(output, torch.Tensor) and output.is_floating_point() else output

    handles = []
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        for unit in layers(model):
            if isinstance(unit, torch.nn.Embedding):
                handles.append(unit.register_forward_hook(hand_on))
            else:
                handles.append(unit.register_forward_pre_hook(widen))
                handles.append(unit.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, data in swapped.items():
            p.data = data


def layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The parts of a model that run one after another: the members of its lists, and what stands beside them."""
    for child in module.children():
        lists = any(isinstance(inner, torch.nn.ModuleList) for inner in child.modules())
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif lists:
            yield from layers(child)
        else:
            yield child


@contextlib.contextmanager
def one_unit_off(model: Any) -> Iterator[None]:
    """The output of every module that owns a weight is multiplied by 1 + eps or 1 - eps, entry by entry, drawn."""
    generator = torch.Generator().manual_seed(0)

    def move(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        eps = product_eps(output)
        sign = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
        return output * (1 + eps * sign.to(output.device, output.dtype))

    with hooked(
        module.register_forward_hook(move)
        for module in model.modules()
        if any(p.is_floating_point() for p in module.parameters(recurse=False))
    ):
        yield
