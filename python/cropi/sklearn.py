"""Random projections for scikit-learn: `RandomProjection` is a transformer over `cropi_kernels.project`.

Needs scikit-learn (``pip install scikit-learn``); nothing else in cropi does, and nothing imports this module.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import DataDimensionalityWarning
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from cropi_kernels import ProjectionSpec, project, project_transpose
from cropi_kernels.ops.project import coordinates

_CHUNK = 1 << 22  # numbers of a float64 or sparse input that are converted at a time


class RandomProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Random projection to ``n_components`` features that keeps inner products: ``E <S x, S y> = <x, y>``.

    As `sklearn.random_projection.SparseRandomProjection`, without a matrix: ``fit`` costs nothing, ``transform`` a
    reading of the input. Results are float32.

    Args:
        n_components: an integer, or ``"auto"`` for the Johnson-Lindenstrauss dimension of ``eps`` and the number of
            samples seen by ``fit`` (an error where that exceeds the number of features).
        kind, nnz: as in `cropi_kernels.ProjectionSpec`.
        eps: greatest relative error of squared distances, for ``n_components="auto"``.
        random_state: seed, RandomState or None.

    Attributes:
        n_components_: features after the projection.
        spec_: the `ProjectionSpec`, which defines S.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        kind: str = "countsketch",
        nnz: int = 1,
        eps: float = 0.1,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.kind = kind
        self.nnz = nnz
        self.eps = eps
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> RandomProjection:
        """Chooses the dimension and the seed; reads no more of ``X`` than its shape (and checks its numbers)."""
        X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype=[np.float32, np.float64])
        n_samples, n_features = X.shape
        if self.n_components == "auto":
            dim = int(johnson_lindenstrauss_min_dim(n_samples=n_samples, eps=self.eps))
            if dim > n_features:
                raise ValueError(
                    f"eps={self.eps} and n_samples={n_samples} lead to a target dimension of {dim} which is larger "
                    f"than the original space with n_features={n_features}: give n_components, or a larger eps"
                )
        elif isinstance(self.n_components, str):
            raise ValueError(f"n_components={self.n_components!r}: give an integer or 'auto'")
        else:
            dim = int(self.n_components)
            if dim > n_features:
                warnings.warn(
                    f"n_components={dim} is higher than the number of features {n_features}: the dimensionality is "
                    "not reduced",
                    DataDimensionalityWarning,
                    stacklevel=2,
                )
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        self.spec_ = ProjectionSpec(dim, kind=self.kind, nnz=self.nnz, seed=seed, size=n_features)  # type: ignore[arg-type]
        self.n_components_ = dim
        return self

    def transform(self, X: Any) -> Any:
        """float32 [n_samples, n_components_] of a dense or sparse ``X`` [n_samples, n_features_in_]."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False, dtype=[np.float32, np.float64])
        if scipy.sparse.issparse(X):
            return self._transform_sparse(X.tocsr())
        out = torch.zeros(X.shape[0], self.n_components_)
        if X.dtype == np.float32 and X.flags.c_contiguous:
            return project(_tensor(X), self.spec_, out=out).numpy()
        step = max(128, _CHUNK // X.shape[0])  # float64 and column-major input: no copy of the whole
        for start in range(0, X.shape[1], step):
            piece = np.ascontiguousarray(X[:, start : start + step], dtype=np.float32)
            project(_tensor(piece), self.spec_, start, out=out)
        return out.numpy()

    def inverse_transform(self, X: Any) -> Any:
        """``S^T x``: float32 [n_samples, n_features_in_], an unbiased reconstruction, ``E S^T S x = x``."""
        check_is_fitted(self)
        X = check_array(X, dtype=np.float32, accept_sparse=["csr", "csc"])
        if scipy.sparse.issparse(X):
            X = X.toarray()
        return project_transpose(_tensor(np.ascontiguousarray(X)), self.spec_, self.n_features_in_).numpy()

    def _transform_sparse(self, X: Any) -> Any:
        """Rows of a CSR matrix: only the coordinates that occur are hashed, no row is made dense as a whole."""
        spec, out = self.spec_, np.zeros((X.shape[0], self.n_components_), np.float32)
        if spec.sparse:
            columns, place = np.unique(X.indices, return_inverse=True)
            bucket, sign = coordinates(spec, columns.astype(np.uint64))
            row = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
            for j in range(spec.nnz):
                cell = row * spec.dim + bucket[j][place]
                values = np.bincount(cell, weights=sign[j][place] * X.data, minlength=out.size)
                out += (values * spec.scale).reshape(out.shape).astype(np.float32)
            return out
        step, columns = max(128, _CHUNK // X.shape[0]), X.tocsc()
        total = torch.from_numpy(out)
        for start in range(0, X.shape[1], step):
            piece = columns[:, start : start + step].toarray().astype(np.float32)
            project(_tensor(piece), spec, start, out=total)
        return out

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _tensor(array: Any) -> torch.Tensor:
    """A tensor over the array's memory, which is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
