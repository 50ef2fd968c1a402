"""Tensor parallel: the group of ranks that share a model, which of them adds what, and the sums over the group.

Every rank of a group runs the same batch. If a parameter is split (a DTensor), a rank sketches its own rows or columns
at their place in the whole. If all ranks have a parameter, one rank adds its gradient, unless each rank has the
gradient of its own tokens or heads: these add up. So the ranks' sketches add up to the whole one, in one sum of
[segments, dim] a batch.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .replaced import parallel_of
from .sharded import units
from .spread import Share, is_spread, local, ranges_of

PARTIAL_STYLE = "ReplicatedWithGradAllReduce"  # transformers': a norm of this rank's heads


class Ranks:
    """The group of ranks that share a model by tensor parallel."""

    def __init__(self, mesh: Any, partial: Mapping[int, str]) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.partial = partial  # names of parameters whose gradient is the sum of all ranks', by their ids

    def share(self, p: torch.Tensor) -> Share:
        """This rank's part of a parameter.

        Raises:
            ValueError: it is spread in a way that is not followed; says which.
        """
        shape = tuple(p.shape)
        if is_spread(p):
            (placement,) = p.placements  # type: ignore[attr-defined]
            axis = getattr(placement, "dim", None)
            if axis is not None:
                axis %= len(shape)
                factor = int(getattr(placement, "split_factor", 1))
                ranges = ranges_of(shape[axis], self.size, self.rank, factor)
                share = Share(shape, axis, ranges)
                if share.size != local(p).shape[axis]:
                    raise ValueError(
                        f"a parameter of shape {shape} has {local(p).shape[axis]} numbers of axis {axis} on rank "
                        f"{self.rank}, where {placement} should leave {share.size}: it is split in a way "
                        "that is not followed; give every rank the whole parameter, or exclude it"
                    )
                return share
        return Share(shape, adds=self.rank == 0 or id(p) in self.partial)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def equal(self, x: torch.Tensor) -> bool:
        """Whether all ranks have the same few numbers."""
        ends = self.max(torch.stack([x, -x]))
        return torch.equal(ends[0], -ends[1])

    def check_same(self, what: str, *tensors: torch.Tensor | None) -> None:
        """Every rank must be given the same batch.

        Raises:
            ValueError: they differ; on every rank.
        """
        mine = _digest([_bytes(t) for t in tensors])
        device = self.mesh.device_type
        if not self.equal(torch.tensor(mine, dtype=torch.float64, device=device)):
            raise ValueError(
                f"{what} differs between the {self.size} ranks of a tensor-parallel group: all of them run the same "
                "batch; give them the same tensors"
            )

    def check_model(self, described: str) -> None:
        """Every rank must have the same model and spec.

        Raises:
            ValueError: they differ; shows two of them, on every rank.
        """
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, described, group=self.group)
        other = next((i for i, text in enumerate(gathered) if text != gathered[0]), None)
        if other is not None:
            raise ValueError(
                "the ranks of a tensor-parallel group have different models or specs: rank 0 has "
                f"{_first_difference(gathered[0], gathered[other])}, rank {other} has "
                f"{_first_difference(gathered[other], gathered[0])}"
            )

    def gathered(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """``x`` [.., a rank's share of ``size``] of all ranks, side by side."""
        from torch.distributed.tensor import DTensor, Shard

        shape = (*x.shape[:-1], size)
        stride = x.new_empty(shape, device="meta").stride()
        spread = DTensor.from_local(
            x.contiguous(),
            self.mesh,
            [Shard(x.ndim - 1)],
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )
        return spread.full_tensor()


class _SumBackward(torch.autograd.Function):
    """``x -> x``; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.ranks.sum(grads[0].clone()), None


class _SumForward(torch.autograd.Function):
    """``x`` summed over the ranks; every rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        return ranks.sum(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def into_parts(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """``x`` as the input of a part of a computation on every rank."""
    out: torch.Tensor = _SumBackward.apply(x, ranks)
    return out


def of_parts(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over the ranks of their parts of a result."""
    out: torch.Tensor = _SumForward.apply(x, ranks)
    return out


class Copies:
    """Whether the ranks have the same gradients of the parameters that every rank has whole."""

    def __init__(self, ranks: Ranks | None, parameters: Iterable[torch.Tensor]) -> None:
        self.ranks = ranks
        self.numbers: dict[int, list[float]] = {}
        if ranks is not None:
            whole = (p for p in parameters if not is_spread(p) and id(p) not in ranks.partial)
            self.numbers = {id(p): [0.0, 0.0] for p in whole}
        # The largest difference of two ranks, by a parameter's id.
        self.apart: dict[int, float] = defaultdict(float)

    def note(self, p: torch.Tensor, gradient: torch.Tensor) -> None:
        """Keep two weighted sums of a gradient, which differ where gradients do; the weights differ in every place."""
        if id(p) not in self.numbers:
            return
        flat = gradient.reshape(-1).double()
        where = torch.arange(len(flat), device=flat.device, dtype=torch.float64)
        for i, turn in enumerate((0.0, 1.6)):
            self.numbers[id(p)][i] += float(flat @ torch.sin(1.7 * where + turn))

    def compare(self) -> None:
        if self.ranks is None or not self.numbers:
            return
        mine = torch.tensor(
            list(self.numbers.values()), dtype=torch.float64, device=self.ranks.mesh.device_type
        )
        most, least = self.ranks.max(torch.stack([mine, -mine]))
        self.apart.update(zip(self.numbers, (most + least).amax(1).tolist()))


def add_over_ranks(
    ranks: Ranks,
    key: Any,
    sums: dict[Any, torch.Tensor],
    added: list[dict[Any, float]],
    largest: list[dict[Any, Any]],
) -> None:
    """Sum the ranks' values under ``key`` in place (``sums``, ``added``), or take their maximum (``largest``).

    A rank that has no value counts as zero.
    """
    device = ranks.mesh.device_type
    shape = list(sums[key].shape) if key in sums else []
    sizes = torch.tensor([len(shape), *shape, 0, 0][:3], dtype=torch.float64, device=device)
    axes, *dims = map(int, ranks.max(sizes).tolist())
    if not axes:
        return
    mine = sums.get(key, torch.zeros(dims[:axes], dtype=torch.float64, device="cpu"))
    sums[key] = ranks.sum(mine.to(device)).to(mine.device)
    for table, reduce in [(t, ranks.sum) for t in added] + [(t, ranks.max) for t in largest]:
        value = reduce(torch.tensor([float(table.get(key, 0.0))], dtype=torch.float64, device=device))
        table[key] = type(table.get(key, 0.0))(value.item())


def ranks_of(model: nn.Module) -> Ranks | None:
    """The tensor-parallel group of a model; None: its parameters are whole, or sharded by FSDP2.

    Raises:
        ValueError: its parameters are spread over more than one group.
    """
    inside = {id(p) for unit in units(model) for p in unit.parameters()}
    spread = {n: p for n, p in model.named_parameters() if is_spread(p) and id(p) not in inside}
    if not spread:
        return None
    first_name, first = next(iter(spread.items()))
    mesh: Any = first.device_mesh  # type: ignore[attr-defined]
    for name, p in spread.items():
        if p.device_mesh != mesh:  # type: ignore[attr-defined]
            raise ValueError(
                f"{first_name} and {name} are spread over different meshes of ranks: only one tensor-parallel group is "
                "followed"
            )
    partial = {
        id(p): name
        for name, module in model.named_modules()
        if (parallel := parallel_of(module)) is not None and parallel.style == PARTIAL_STYLE
        for p in module.parameters(recurse=False)
    }
    return Ranks(mesh, partial)


# ------------------------------------------------------------------------------------------------- digests
def _bytes(t: torch.Tensor | None) -> bytes:
    if t is None:
        return b"none"
    here = t.detach().cpu().contiguous()
    if not here.numel():
        return b""
    return repr((tuple(t.shape), t.dtype)).encode() + here.view(torch.uint8).numpy().tobytes()


def _digest(parts: list[bytes]) -> list[float]:
    """Numbers that float64 holds exactly."""
    sha = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    return [float(int.from_bytes(sha[i : i + 4], "little")) for i in range(0, 16, 4)]


def _first_difference(mine: str, other: str) -> str:
    for line, against in zip(mine.splitlines(), [*other.splitlines(), *[""] * mine.count("\n")]):
        if line != against:
            return line
    return "less"
