"""Second moments of an optimiser, from a checkpoint: what a step divides each coordinate of a gradient by.

    Adam       D = 1 / (sqrt(v / (1 - beta_2^t)) + eps)
    Adafactor  D = 1 / (sqrt(r c^T / mean(r)) + eps),    r, c the moving averages over rows and columns

(torch's has no eps there, but mean(r) at least eps_1, and what the root is taken of at least eps_1^2.)
(Kingma and Ba, ICLR 2015; Shazeer and Stern, ICML 2018; with ``amsgrad``, v is the largest so far: Reddi et al., ICLR
2018.) Where groups of parameters have learning rates of their own, D is multiplied by a group's rate over the largest.
A step of such an optimiser along a training prompt's gradient g(s) changes the validation objective by
``eta <D g(s), g(v)> = eta <g(s), D g(v)>``: the validation side alone has to be scaled, and stores of training prompts
stay as they are. Left out is by what Adafactor scales the step of each parameter: its root mean square, and the
clipping of the update, which is not linear in g.

D is 0 where no gradient has ever been, as in the embedding's rows of tokens that were not trained on: the formula's
1 / eps is a step that no optimiser makes (its v grows with the gradient), and a single such row would be all of the
vector.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError, optional, shown, warn
from cropi.files import entries, failure_of, is_file, is_folder, meant, reading, reason
from cropi.temporary import KeptFolder
from cropi_kernels import canonical_name

SECOND, LARGEST = "exp_avg_sq", "max_exp_avg_sq"
ROW, COLUMN = "exp_avg_sq_row", "exp_avg_sq_col"
# Of squares of gradients: there was none. Adafactor of transformers adds 1e-30 to each.
NONE = 2e-30
# torch.optim.Adafactor's names; its rows are [..., r, 1] and its columns [..., 1, c].
OTHER_NAMES = {"variance": SECOND, "row_var": ROW, "col_var": COLUMN}
NAMES = ("optimizer.pt", "optimizer.bin", "optimizer.safetensors")  # of a checkpoint folder, in this order
GIVE = (
    "give a file that torch.save wrote of optimizer.state_dict(), a .safetensors file with NAME.exp_avg_sq, a folder "
    "of torch.distributed.checkpoint, or a checkpoint folder that holds one of them"
)


class UnknownOrder(UserWarning):
    """Which parameter a moment belongs to is taken from its number."""


@dataclass(frozen=True)
class SecondMoments:
    """Second moments by the canonical name of the parameter.

    Attributes:
        whole: float tensors of the parameters' shapes (Adam; Adafactor's vectors).
        factored: pairs of row and column averages (Adafactor's matrices).
        correction: what ``whole`` is divided by: ``1 - beta_2^t``.
        eps: added to the root.
        rate: the learning rate over the largest of all groups.
        least: of torch's Adafactor, its eps_1.
        kind: "adam" or "adafactor".
        source: what it was read from.
    """

    whole: Mapping[str, torch.Tensor]
    factored: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    correction: Mapping[str, float]
    eps: Mapping[str, float]
    rate: Mapping[str, float]
    kind: str
    source: str
    least: Mapping[str, float] = field(default_factory=dict)

    def scaled(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """``D gradient`` of one parameter, float32."""
        least = self.least.get(name, 0.0)
        if name in self.factored:
            row, column = (part.to(gradient) for part in self.factored[name])
            mean = row.mean(dim=-1, keepdim=True).clamp_min(least)
            moment = row[..., :, None] * column[..., None, :] / mean[..., None]
            none = (row <= NONE)[..., :, None] | (column <= NONE)[..., None, :]
        else:
            moment = self.whole[name].to(gradient) / self.correction[name]
            none = self.whole[name].to(gradient.device) <= NONE
        step = gradient * self.rate[name] / (moment.clamp_min(least**2).sqrt() + self.eps[name])
        return step.masked_fill(none, 0.0)

    def check(self, model: Any, names: Sequence[str]) -> None:
        """Check that every one of a model's parameters has a moment of its shape.

        Raises:
            CropiError: names the first parameter that has none, or one of another shape.
        """
        wanted = set(names)
        for full, p in model.named_parameters():
            name = canonical_name(full)
            if name not in wanted:
                continue
            shape = self._shape(name)
            if shape != tuple(p.shape):
                there = "has none" if shape is None else f"has one of shape {list(shape)}"
                raise CropiError(
                    f"optimizer_state: {self.source} {there} for the parameter {name} {list(p.shape)}; give the state "
                    "of the optimiser that trained this model"
                )

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.factored:
            row, column = self.factored[name]
            return (*row.shape, column.shape[-1])
        return tuple(self.whole[name].shape) if name in self.whole else None

    def fingerprint(self) -> dict[str, Any]:
        """What a store's manifest says of it: the kind, the largest eps, and a SHA-256 of all moments."""
        eps = max(self.eps.values(), default=0.0)
        digest = hashlib.sha256(b"D = 0 where v = 0\n")  # earlier builds took 1 / eps
        parts: list[tuple[str, torch.Tensor]] = [(name, value) for name, value in self.whole.items()]
        parts += [
            (f"{name}.{i}", part) for name, pair in self.factored.items() for i, part in enumerate(pair)
        ]
        for name, value in sorted(parts, key=lambda pair: pair[0]):
            digest.update(f"{name} {list(value.shape)} {self.correction.get(name)}\n".encode())
            digest.update(value.float().contiguous().cpu().numpy().tobytes())
        apart = [
            (n, self.eps[n], self.rate[n]) for n in self.eps if (self.eps[n], self.rate[n]) != (eps, 1.0)
        ]
        digest.update("".join(f"{name} {e} {rate}\n" for name, e, rate in sorted(apart)).encode())
        digest.update("".join(f"{name} {value}\n" for name, value in sorted(self.least.items())).encode())
        return {"kind": self.kind, "eps": eps, "moments": digest.hexdigest()[:32]}


def read_moments(source: Any, model: Any) -> SecondMoments:
    """The second moments in a checkpoint, or of an optimiser.

    Args:
        source: a ``torch.optim.Optimizer`` of the model's parameters; a path: what ``torch.save`` wrote of its
            ``state_dict()`` (``optimizer.pt`` of Hugging Face's Trainer), a ``.safetensors`` file with the keys
            ``NAME.exp_avg_sq``, a folder of ``torch.distributed.checkpoint``, or a checkpoint folder with one of these.
        model: whose parameters the moments belong to.

    Raises:
        CropiError: there is no such file, it holds no second moments, or they are of another model: names the first
            parameter that differs.
    """
    if isinstance(source, torch.optim.Optimizer):
        return _of_optimizer(source, model)
    path = file_of(Path(source))
    if is_folder(path):
        return _by_name(_distributed(path), str(path))
    if path.suffix == ".safetensors":
        return _by_name(_loaded(path, optional("safetensors.torch").load_file), str(path))
    state = _loaded(path, partial(torch.load, map_location="cpu", weights_only=True))
    if not isinstance(state, dict):
        return _by_name({}, str(path))
    # Trainers save it alone, or under a name beside the model's weights.
    dicts = [one for one in (state, *state.values()) if isinstance(one, dict)]
    whole = [one for one in dicts if {"state", "param_groups"} <= one.keys()]
    if len(whole) > 1:
        raise CropiError(f"optimizer_state: {path} holds {len(whole)} optimisers; {GIVE}")
    return _of_state(whole[0], model, str(path)) if whole else _by_name(state, str(path))


def _loaded(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        with reading(path, missing=True):
            return load(path)
    except CropiError:
        raise
    except Exception as error:  # the loaders have errors of their own
        if failure := failure_of(error):
            raise CropiError(
                f"cannot read {path}: {reason(failure, 'give a path that can be read')}"
            ) from error
        raise CropiError(
            f"optimizer_state: {path} cannot be read ({shown(str(error), 300)}); {GIVE}"
        ) from error


def file_of(path: Path) -> Path:
    """The file, or the folder of a distributed checkpoint, that a path leads to; raises a CropiError where none is."""
    if os.path.isfile(path) or os.path.isfile(path / ".metadata"):
        return path
    if not os.path.isdir(path):
        raise CropiError(f"optimizer_state: there is no file {path}; {meant(path)}{GIVE}")
    for name in NAMES:
        if is_file(path / name):
            return path / name
    for folder in entries(path, "optim*"):
        if is_file(folder / ".metadata"):
            return folder
    raise CropiError(
        f"optimizer_state: {path} holds none of {', '.join(NAMES)} and no distributed checkpoint; {GIVE}"
    )


def _distributed(path: Path) -> dict[str, Any]:
    """Everything of a distributed checkpoint, by its flat keys."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with closing(KeptFolder("cropi-state-")) as folder:
        whole = folder.path / "state.pt"
        try:
            dcp_to_torch_save(path, whole)
            held = torch.load(whole, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            if isinstance(error, OSError) and error.errno:
                raise CropiError(f"optimizer_state: {error.filename or path}: {reason(error)}") from error
            raise CropiError(f"optimizer_state: {path} cannot be read ({error}); {GIVE}") from error
    return dict(_flat(held))


def _flat(held: Any, before: str = "") -> list[tuple[str, Any]]:
    if isinstance(held, (list, tuple)) and held and all(isinstance(one, Mapping) for one in held):
        held = {str(i): one for i, one in enumerate(held)}
    if not isinstance(held, Mapping):
        return [(before, held)]
    return [
        pair
        for key, value in held.items()
        for pair in _flat(value, f"{before}.{key}" if before else str(key))
    ]


def _by_name(flat: Mapping[str, Any], source: str) -> SecondMoments:
    """The moments in a flat mapping with keys like ``NAME.exp_avg_sq``; before the name may stand ``...state.``."""
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in _flat(flat):
        name, _, field = key.rpartition(".")
        if "param_groups." in key:
            groups.setdefault(name.rpartition("param_groups.")[2], {})[field] = value
        elif field in (SECOND, LARGEST, ROW, COLUMN, "step", *OTHER_NAMES):
            states.setdefault(canonical_name(name.rpartition("state.")[2]), {})[field] = value
    settings = {
        canonical_name(str(name)): _settings(group)
        # A group holds its parameters' names, or is one parameter's and named after it.
        for owner, group in groups.items()
        for name in group.get("params", [owner])
    }
    if settings and (without := [name for name in states if name not in settings]):
        raise CropiError(f"optimizer_state: {source} names no group of parameters for {without[0]}; {GIVE}")
    return _made(states, settings, source)


def _of_optimizer(optimizer: torch.optim.Optimizer, model: Any) -> SecondMoments:
    names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
    states, settings = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise CropiError(
                    f"optimizer_state: the optimiser trains a parameter of shape {list(p.shape)} that the model does "
                    "not have; give the optimiser of this model"
                )
            states[names[id(p)]] = optimizer.state.get(p, {})
            settings[names[id(p)]] = _settings(group)
    return _made(states, settings, type(optimizer).__name__)


def _of_state(state: Mapping[str, Any], model: Any, source: str) -> SecondMoments:
    """The moments in an ``optimizer.state_dict()``, which numbers its parameters group by group."""
    parameters = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    states, settings = {}, {}
    orders = _orders(state["param_groups"], parameters, model)
    first_problem = ""
    for names, known in orders:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        if len(numbers) != len(names):
            both = min(len(numbers), len(names))
            first = _first_wrong(names[:both], numbers[:both], state["state"], parameters)
            first = first or ("" if both == len(names) else f"has none for the parameter {names[both]}")
            count = f"holds {len(numbers)} parameters, and the model trains {len(names)}"
            first_problem = first_problem or f"{count}{': it ' if first else ''}{first}"
            continue
        wrong = _first_wrong(names, numbers, state["state"], parameters)
        if wrong:
            first_problem = first_problem or wrong
            continue
        if not known:
            warn(
                f"optimizer_state: {source} numbers its parameters in {len(state['param_groups'])} groups and names "
                "none; the model's own order is taken, and groups in another one would give parameters of one shape "
                "each other's moments: make the optimiser of groups of (name, parameter) (torch 2.6), or save it as "
                "torch.distributed.checkpoint does, which names them", UnknownOrder,
            )  # fmt: skip
        of_group = [group for group in state["param_groups"] for _ in group["params"]]
        for name, number, group in zip(names, numbers, of_group, strict=True):
            states[name] = state["state"].get(number, state["state"].get(str(number), {}))
            settings[name] = _settings(group)
        return _made(states, settings, source)
    raise CropiError(
        f"optimizer_state: {source} {first_problem}; give the state of the optimiser that trained this model"
    )


def _orders(
    groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], model: Any
) -> list[tuple[list[str], bool]]:
    """The orders in which the numbered parameters may stand, and whether the groups tell that it is this one.

    If the groups hold names, it is their order. Otherwise it is that of Hugging Face's Trainer (weights that decay come
    first), or that of the model.
    """
    if all("param_names" in group for group in groups):
        return [([canonical_name(name) for group in groups for name in group["param_names"]], True)]
    plain = list(parameters)
    orders = [(plain, len(groups) == 1)]
    try:
        from transformers.trainer_pt_utils import get_parameter_names

        kept = get_parameter_names(
            model,
            [torch.nn.LayerNorm],
            [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"],
        )
        decay = {canonical_name(name) for name in kept}
        first, rest = [n for n in plain if n in decay], [n for n in plain if n not in decay]
        known = [len(group["params"]) for group in groups] == [len(first), len(rest)]
        orders.insert(0, ([*first, *rest], known))
    except (ImportError, TypeError):
        pass
    if len(groups) == 1:
        orders.reverse()
    return orders


def _first_wrong(
    names: Sequence[str], numbers: Sequence[Any], state: Mapping[Any, Any], parameters: Mapping[str, Any]
) -> str:
    """What is wrong with the first parameter whose moment has another shape, in words; "" if all fit."""
    for name, number in zip(names, numbers, strict=True):
        held = _named(state.get(number, state.get(str(number), {})))
        shape = None
        if isinstance(held.get(SECOND), torch.Tensor):
            shape = list(held[SECOND].shape)
        elif isinstance(held.get(ROW), torch.Tensor):
            shape = [*held[ROW].shape, held[COLUMN].shape[-1]]
        if name not in parameters:
            return f"names the parameter {name}, which the model does not train"
        if shape is not None and shape != list(parameters[name].shape):
            return f"has a moment of shape {shape} for the parameter {name} {list(parameters[name].shape)}"
    return ""


def _named(held: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state, by the names that this module uses."""
    made = {OTHER_NAMES.get(key, key): value for key, value in held.items()}
    if LARGEST in held:
        made[SECOND] = held[LARGEST]
    if "row_var" in held:
        made |= {ROW: held["row_var"].squeeze(-1), COLUMN: held["col_var"].squeeze(-2)}
    return made


@dataclass(frozen=True)
class _Settings:
    """What a group of parameters sets; None where a file does not say it."""

    eps: float | None = None
    beta: float | None = None
    rate: float | None = None


def _settings(group: Mapping[str, Any]) -> _Settings:
    eps, betas = group.get("eps"), group.get("betas")
    if isinstance(eps, (tuple, list)):  # Adafactor's first is about the squares, and far below any of them
        eps = eps[0]
    # A schedule moves all groups' rates by one factor, and may have ended at zero.
    rate = group.get("initial_lr", group.get("lr"))
    found = (None if value is None else float(value) for value in (eps, betas and betas[1], rate))
    return _Settings(*found)


def _made(
    states: Mapping[str, Mapping[str, Any]], settings: Mapping[str, _Settings], source: str
) -> SecondMoments:
    named = {name: _named(held) for name, held in states.items()}
    groups = {name: settings.get(name, _Settings()) for name in states}
    whole = {n: held[SECOND] for n, held in named.items() if isinstance(held.get(SECOND), torch.Tensor)}
    factored = {
        n: (held[ROW], held[COLUMN]) for n, held in named.items() if isinstance(held.get(ROW), torch.Tensor)
    }
    if not whole and not factored:
        raise CropiError(f"optimizer_state: {source} holds no second moments ({SECOND}); {GIVE}")
    # Adafactor's moments are corrected by their growing decay.
    correction = {
        name: 1.0 if factored else _correction(groups[name].beta, named[name].get("step"), name, source)
        for name in whole
    }
    rates = [group.rate for group in groups.values() if group.rate is not None]
    for name, values in (("eps", [group.eps or 0.0 for group in groups.values()]), ("learning rate", rates)):
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise CropiError(f"optimizer_state: {source} holds a negative or infinite {name}")
    for name, value in whole.items():
        if not bool(value.isfinite().all()) or bool((value < 0).any()):
            raise CropiError(f"optimizer_state: {source} holds a negative or infinite moment for {name}")
    eps, least = {}, {}
    for name, group in groups.items():
        if OTHER_NAMES.keys().isdisjoint(states[name]):
            eps[name] = 1e-8 if group.eps is None else max(group.eps, 1e-30)
        else:  # torch's Adafactor
            moment: Any = named[name].get(ROW, named[name].get(SECOND))
            least[name] = torch.finfo(moment.dtype).eps if group.eps is None else group.eps
            eps[name] = 0.0 if least[name] else 1e-30
    largest = max(rates, default=0.0)
    rate = {n: 1.0 if g.rate is None or not largest else g.rate / largest for n, g in groups.items()}
    kind = "adafactor" if factored else "adam"
    return SecondMoments(whole, factored, correction, eps, rate, kind, source, least)


def _correction(beta: float | None, step: Any, name: str, source: str) -> float:
    """``1 - beta^step`` of Adam; 1 where a file does not say the steps: it holds late moments."""
    if beta is None or step is None:
        return 1.0
    made = 1.0 - float(beta) ** float(step)
    if not made > 0:
        raise CropiError(
            f"optimizer_state: {source} is of an optimiser that has made no step yet ({name}); give a later "
            "checkpoint"
        )
    return made
