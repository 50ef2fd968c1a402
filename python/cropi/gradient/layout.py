"""How a prompt group is laid out for the model: sharing the prompt among its responses, or one row a
response.

*shared*: one row holds ``[prompt, response_1, ..., response_m]``; the positions of every response go on from
the prompt's, and a mask lets a response see the prompt and itself only. The prompt is computed once.
*padded*: one row is ``[prompt, response]``, padded on the right, with plain causal attention.

Both give the same gradient wherever attention is the only path between tokens and positions come from
``position_ids``. That is not so for ALiBi, state-space or linear-attention layers, or attention code that
takes no boolean mask, so a model is tried in both layouts: see ``layout_trial.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cropi.errors import CropiError, warn
from cropi.gradient.layout_trial import LayoutTrial
from cropi.model.placing import experts_of_a_token
from cropi.model.policy import Policy
from cropi_kernels.sketcher.model.precision import unwrapped
from cropi_kernels.sketcher.policy.lengths import Lengths, measure_lengths

LAYOUTS = ("auto", "shared", "padded")


@dataclass(frozen=True)
class Layout:
    """A layout and what bounds it.

    Attributes:
        shared: share the prompt where that is cheaper.
        window: the shortest sliding window of the model's layers: longer sequences cannot be shared, because
            the mask that is passed replaces the model's own in every layer.
        strict: the user chose "shared", so a sequence beyond the window raises an error.
        attention_cost: cost of attending to one token, in units of the cost of one token in all linear
            layers.
        note: why the layout is not the shared one, to be shown to the user.
        lengths: which rows may be in one batch, of a model that scales positions by the longest row of a batch.
        trial: what the model was tried on; longer rows are tried before they are used. None: it is taken as it is.
        added: the dtype of the mask that the model's attention adds to its scores; None: it is handed a bool one.
    """

    shared: bool
    window: int | None = None
    strict: bool = False
    attention_cost: float = 0.0
    note: str = ""
    lengths: Lengths = Lengths()
    trial: LayoutTrial | None = field(default=None, repr=False, compare=False)
    added: torch.dtype | None = None

    def shares(self, shortest: int, longest: int, name: str) -> bool:
        """Whether a group may be shared whose shortest prompt + response has ``shortest`` tokens, the longest
        ``longest``."""
        if not self.shared or (self.trial is not None and self.trial.problem):
            return False
        if self.window is not None and longest > self.window:
            problem = f"needs {longest} tokens, but the model has sliding-window layers of {self.window}"
        # The last token of a response is predicted and no input.
        elif not self.lengths.together(shortest - 1, longest - 1):
            problem = (
                f"has responses of {shortest} to {longest} tokens with the prompt, and beyond "
                f"{self.lengths.switch} tokens the model scales the positions of all of them by the longest one"
            )
        else:
            return True
        if self.strict:
            raise CropiError(
                f"layout 'shared': prompt {name!r} {problem}; pass --layout auto or --layout padded"
            )
        return False

    def beside(self, behaviour: Lengths) -> Layout:
        """The layout where a behaviour model reads the same rows, which may have lengths of its own.

        Raises:
            CropiError: "shared" was asked for by name, and that model's positions depend on the longest response.
        """
        if not self.shared or behaviour.switch is None or behaviour == self.lengths:
            return self
        problem = (
            f"beyond {behaviour.switch} tokens the behaviour model scales positions by the longest response"
        )
        if self.strict:
            raise CropiError(f"layout 'shared': {problem}; pass --layout auto or --layout padded")
        return replace(self, shared=False, note=f"prompts are not shared between responses: {problem}")

    def take(self, prompt: Sequence[int], responses: Sequence[Sequence[int]], name: str) -> bool:
        """Whether this row may be shared: the model is tried on it, unless it was on a longer one.

        Raises:
            CropiError: "shared" was asked for by name, and the model would compute something else.
        """
        if self.trial is None or self.trial.passes(prompt, responses):
            return True
        if self.strict:
            raise CropiError(
                f"layout 'shared' does not work for prompt {name!r}: {self.trial.problem}; pass --layout auto or "
                "--layout padded"
            )
        warn(f"prompts are not shared between responses: {self.trial.problem}")
        return False


def choose_layout(model: Any, asked: str = "auto") -> Layout:
    """Decide on the layout for a model.

    Raises:
        CropiError: an unknown name, or "shared" for a model that would not compute the same in it.
    """
    if asked not in LAYOUTS:
        raise CropiError(f"layout must be one of {', '.join(LAYOUTS)}, got {asked!r}")
    lengths = measure_lengths(model)
    if asked == "padded":
        return Layout(shared=False, lengths=lengths)
    trial = LayoutTrial(unwrapped(model))
    size = trial.model.get_input_embeddings().weight.shape[0]
    made = [(7919 * (i + 1)) % size for i in range(13)]
    if trial.passes(made[:5], [made[5:9], made[9:13]]):
        cost = attention_cost(trial.model)
        return Layout(
            True,
            sliding_window(trial.model),
            asked == "shared",
            cost,
            lengths=lengths,
            trial=trial,
            added=trial.takes_added(made[:5], [made[5:9], made[9:13]]),
        )
    if asked == "shared":
        raise CropiError(
            f"layout 'shared' does not work for this model: {trial.problem}; pass --layout padded"
        )
    note = f"prompts are not shared between responses: {trial.problem}"
    return Layout(shared=False, note=note, lengths=lengths)


def layout_of(policy: Policy, asked: str = "auto") -> Layout:
    """:func:`choose_layout` for a policy; the model is asked once for each kind of attention."""
    attention = getattr(getattr(policy.model, "config", None), "_attn_implementation", None)
    return policy.once(("layout", asked, attention), lambda: choose_layout(policy.model, asked))


def sliding_window(model: Any) -> int | None:
    """The shortest attention window of the model's layers, or None when all attend to everything."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = []
    if kinds & {"sliding_attention", "chunked_attention"} or not kinds:
        in_use = getattr(config, "use_sliding_window", True)
        windows = [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size") if in_use
        ]
    return min((int(window) for window in windows if window), default=None)


def attention_cost(model: Any) -> float:
    """Cost of attending to one token relative to that of one token in all linear layers of the blocks.

    With frozen weights a token costs 2 N operations forward and 2 N backward in N weights; of experts, those count that
    it goes through. Attending to one token costs two products of size H forward and five backward in each layer, 14 H
    operations.
    """
    config = model.config.get_text_config()
    heads, sizes = (_by_layer(config, name) for name in ("num_attention_heads", "head_dim"))
    width = 0
    for count, size in zip(heads, sizes, strict=True):
        count = int(count or 1)
        width += count * int(size or config.hidden_size // count)
    # A head of several layers has no weight of its own.
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(getattr(table, "weight", None)) for table in both}
    matrices = [p for p in model.parameters() if p.ndim in (2, 3) and id(p) not in tables]
    chosen = experts_of_a_token(model)
    weights = sum(p.numel() if p.ndim == 2 else chosen * p[0].numel() for p in matrices)
    return 3.5 * width / max(weights, 1)


def _by_layer(config: Any, name: str) -> list[Any]:
    """A value of the config for every layer; where layers differ, ``transformers`` refuses to name one for all."""
    layers = int(config.num_hidden_layers)
    try:
        return [getattr(config, name, None)] * layers
    except RuntimeError:
        return [getattr(config.per_layer_config[i], name, None) for i in range(layers)]
