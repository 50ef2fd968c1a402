"""Random projections in the shapes that other code expects: TRAK's projectors, and a torch module.

``from cropi_kernels.projectors import BasicProjector`` in place of ``from trak.projectors import BasicProjector`` is
the whole change; the same for ``CudaProjector`` and ``ChunkedCudaProjector``. Beside TRAK's ``normal`` and
``rademacher``, ``proj_type`` may be ``countsketch`` or ``sjlt``, which cost a reading of the gradients whatever
``proj_dim`` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from ._spec_base import check_int
from .ops.project import ProjectionSpec, project, project_transpose
from .ops.project.spec import Kind

__all__ = ["BasicProjector", "ChunkedCudaProjector", "CudaProjector", "ProjectionType", "RandomProjection"]

Grads = torch.Tensor | Mapping[str, torch.Tensor]


class ProjectionType(str, Enum):
    """Names of `proj_type`; plain strings do as well."""

    normal = "normal"
    rademacher = "rademacher"
    countsketch = "countsketch"
    sjlt = "sjlt"


_KINDS: dict[str, Kind] = {
    "normal": "gaussian",
    "gaussian": "gaussian",
    "rademacher": "rademacher",
    "countsketch": "countsketch",
    "sjlt": "sjlt",
}


class RandomProjection(nn.Module):
    """``forward(x) = S x`` for rows ``x`` [..., size], differentiable, traced by torch.compile as one operator.

    Holds no parameters and no buffers: the spec is the whole state, and travels in the state dict.

    >>> layer = RandomProjection(ProjectionSpec(64, size=1000))
    >>> layer(torch.randn(2, 3, 1000)).shape
    torch.Size([2, 3, 64])

    Args:
        spec: what S is; with a ``size``, input that does not fit is refused.
        offset: coordinate of the first column of ``x``.
    """

    def __init__(self, spec: ProjectionSpec, offset: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.offset = check_int("offset", offset, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if not torch.compiler.is_compiling():
            return project(flat, self.spec, self.offset).reshape(*x.shape[:-1], self.spec.dim)
        y: torch.Tensor = torch.ops.cropi.project(flat, self.offset, self.spec.recipe, None)
        return y.reshape(*x.shape[:-1], self.spec.dim)

    def transpose(self, y: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """``S^T y``: rows [..., dim] to [..., size]; ``size`` defaults to ``spec.size - offset``."""
        if size is None:
            if self.spec.size is None:
                raise ValueError("size=None needs a spec with a size: give the number of coordinates")
            size = self.spec.size - self.offset
        flat = project_transpose(y.reshape(-1, y.shape[-1]), self.spec, size, self.offset)
        return flat.reshape(*y.shape[:-1], size)

    def get_extra_state(self) -> dict[str, Any]:
        return {"spec": self.spec.to_dict(), "offset": self.offset}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        saved = ProjectionSpec.from_dict(state["spec"]), state["offset"]
        if saved != (self.spec, self.offset):
            raise ValueError(f"the saved projection is {saved}, this module is {(self.spec, self.offset)}")

    def extra_repr(self) -> str:
        return f"{self.spec}, offset={self.offset}"


class BasicProjector(nn.Module):
    """Drop-in for ``trak.projectors.BasicProjector``; constructor, attributes and methods have TRAK's names.

    Differences: no projection matrix is held, so construction is free and `free_memory` has nothing to free; another
    ``block_size`` gives the same projection; a dict of gradients is projected parameter by parameter, without being
    copied into one matrix; ``model_id`` selects an independent projection, never one that another seed also has.

    >>> projector = BasicProjector(grad_dim=1000, proj_dim=64, seed=0, proj_type="rademacher")
    >>> projector.project(torch.randn(5, 1000), model_id=0).shape
    torch.Size([5, 64])

    Args:
        grad_dim: coordinates of a gradient; input of another width is refused.
        proj_dim: numbers per projected gradient, any integer.
        seed, proj_type, device, block_size, dtype, model_id: as in TRAK. The work is done where the gradients are.
        nnz: nonzeros per coordinate of ``proj_type="sjlt"``.
        normalize: TRAK's projections are not scaled: ``|y|^2`` is about ``proj_dim |x|^2``, and so is it here. True
            divides by ``sqrt(proj_dim)``, so that inner products are those of the gradients.

    Raises:
        ValueError: ``proj_type`` is not one of `ProjectionType`, or a size is refused by `ProjectionSpec`.
        RuntimeError: the machine has no such ``device``, or there is no kernel for it.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device = "cpu",
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *args: Any,
        nnz: int = 4,
        normalize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        name = proj_type.value if isinstance(proj_type, Enum) else proj_type
        if name not in _KINDS:
            raise ValueError(f"proj_type={proj_type!r}: choose one of {', '.join(_KINDS)}")
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda") or kind == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                f"device={device}: there is no such device here, or no kernel; use device='cpu'"
            )
        self._kind = _KINDS[name]
        self.grad_dim = check_int("grad_dim", grad_dim, 1)
        self.proj_dim = check_int("proj_dim", proj_dim, 1)
        self.seed = check_int("seed", seed, 0)
        self.proj_type, self.device, self.dtype, self.model_id = proj_type, device, dtype, model_id
        self.block_size, self.nnz, self.normalize = min(proj_dim, block_size), nnz, normalize
        self.spec(model_id)  # raises for sizes that no projection has

    def spec(self, model_id: int) -> ProjectionSpec:
        """The projection of one checkpoint."""
        nnz = self.nnz if self._kind == "sjlt" else 1
        return ProjectionSpec(
            self.proj_dim, kind=self._kind, nnz=nnz, seed=self.seed, stream=model_id, size=self.grad_dim
        )

    def project(self, grads: Grads, model_id: int) -> torch.Tensor:
        """Projected gradients [B, proj_dim] of ``grads`` [B, grad_dim] or a dict of per-sample gradients [B, ...]."""
        self.model_id = model_id
        pieces = list(_pieces(grads))
        width = sum(piece.shape[1] for piece in pieces)
        if width != self.grad_dim:
            raise ValueError(f"grads have {width} coordinates but grad_dim={self.grad_dim}")
        spec, offset = self.spec(model_id), 0
        dtype = torch.promote_types(pieces[0].dtype, torch.float32)  # whatever torch's default is
        out = torch.zeros(pieces[0].shape[0], self.proj_dim, dtype=dtype, device=pieces[0].device)
        for piece in pieces:
            project(piece, spec, offset, out=out)
            offset += piece.shape[1]
        if not self.normalize:
            out *= self.proj_dim**0.5
        return out.to(self.dtype)

    forward = project

    def free_memory(self) -> None:
        """Nothing is held, nothing is freed."""


class CudaProjector(BasicProjector):
    """Drop-in for ``trak.projectors.CudaProjector``: its signature, any batch size, the projection of `BasicProjector`.

    On a CPU it is the same projection, which TRAK's two classes are not.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device = "cpu",
        max_batch_size: int = 32,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device, *args, **kwargs)
        self.max_batch_size = max_batch_size


class ChunkedCudaProjector(nn.Module):
    """Drop-in for ``trak.projectors.ChunkedCudaProjector``: dicts of gradients whose parameters fill several chunks.

    The chunks have projectors of their own, as in TRAK; the parameters of a chunk are projected where they lie, at
    their offset, so that no ``[feat_bs, max_chunk_size]`` buffer exists.
    """

    def __init__(
        self,
        projector_per_chunk: Sequence[BasicProjector],
        max_chunk_size: int,
        params_per_chunk: Sequence[int],
        feat_bs: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not projector_per_chunk or len(projector_per_chunk) != len(params_per_chunk):
            raise ValueError(
                f"{len(projector_per_chunk)} projectors for {len(params_per_chunk)} chunks: give one for each chunk"
            )
        self.projector_per_chunk = list(projector_per_chunk)  # no parameters, no buffers: nothing to register
        self.proj_dim, self.proj_type = projector_per_chunk[0].proj_dim, projector_per_chunk[0].proj_type
        self.max_chunk_size, self.params_per_chunk = max_chunk_size, list(params_per_chunk)
        self.feat_bs, self.device, self.dtype = feat_bs, device, dtype

    def project(self, grads: Mapping[str, torch.Tensor], model_id: int) -> torch.Tensor:
        """[B, proj_dim]: the sum over the chunks of their projections."""
        chunks: list[list[torch.Tensor]] = [[]]
        filled = 0
        for piece in _pieces(grads):
            if filled + piece.shape[1] > self.max_chunk_size and chunks[-1]:
                chunks.append([])
                filled = 0
            chunks[-1].append(piece)
            filled += piece.shape[1]
        sizes = [sum(piece.shape[1] for piece in chunk) for chunk in chunks]
        if sizes != self.params_per_chunk:
            raise ValueError(
                f"the gradients fill chunks of {sizes} coordinates but params_per_chunk={self.params_per_chunk}"
            )
        parts = [
            projector.project({str(i): piece for i, piece in enumerate(chunk)}, model_id)
            for projector, chunk in zip(self.projector_per_chunk, chunks)
        ]
        return torch.stack(parts).sum(0).to(self.dtype)

    forward = project

    def free_memory(self) -> None:
        """Nothing is held, nothing is freed."""


def _pieces(grads: Grads) -> Iterator[torch.Tensor]:
    """Matrices [B, n] in the order of the coordinates."""
    if isinstance(grads, torch.Tensor):
        if grads.ndim != 2:
            raise ValueError(f"grads has shape {tuple(grads.shape)}: it must be [B, grad_dim]")
        yield grads.detach()
        return
    if not grads:
        raise ValueError("grads is an empty dict: give the per-sample gradient of every parameter")
    for name, grad in grads.items():
        if grad.ndim == 0:
            raise ValueError(f"grads[{name!r}] has no batch dimension: give per-sample gradients [B, ...]")
        yield grad.detach().reshape(grad.shape[0], -1)
