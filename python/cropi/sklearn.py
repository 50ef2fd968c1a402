"""Random projections for scikit-learn: `RandomProjection` is a transformer over `cropi_kernels.project`.

Needs scikit-learn (``pip install 'cropi-kernels[sklearn]'``); nothing else in cropi does, and
nothing imports this module.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch

from cropi.errors import optional
from cropi_kernels import CsrRows, ProjectionSpec, project, project_csr, project_csr_sparse, project_transpose
from cropi_kernels.ops.project import coordinates

try:
    import scipy.sparse
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import DataDimensionalityWarning
    from sklearn.random_projection import johnson_lindenstrauss_min_dim
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ModuleNotFoundError:
    # Its error says which extra to install.
    optional("sklearn")
    raise

_CHUNK = 1 << 22  # numbers of a sparse input, or entries of S, that are made dense at a time
_AT_ONCE = 32


class RandomProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Random projection to ``n_components`` features that keeps inner products: ``E <S x, S y> = <x, y>``.

    As `sklearn.random_projection.SparseRandomProjection`, without a matrix: ``fit`` costs nothing, ``transform`` a
    reading of the input. float32 comes out as float32, all else as float64; sums are made in the same precision.
    ``inverse_transform`` is ``S^T``, an unbiased reconstruction, where scikit-learn's is the pseudo-inverse: that would
    have to be computed from a matrix, and held (so there is no ``compute_inverse_components``).

    >>> projection = RandomProjection(64, random_state=0)
    >>> projection.fit_transform(np.ones((3, 1000), np.float32)).shape
    (3, 64)

    Args:
        n_components: an integer, or ``"auto"`` for the Johnson-Lindenstrauss dimension of ``eps`` and the number of
            samples seen by ``fit`` (an error where that exceeds the number of features).
        kind, nnz: as in `cropi_kernels.ProjectionSpec`; ``nnz`` above ``n_components`` is lowered to it with a warning.
        eps: greatest relative error of squared distances, for ``n_components="auto"``.
        dense_output: False gives a CSR matrix for sparse input. A row of n numbers has up to ``n * nnz`` of
            ``n_components``, so that pays where ``n_components`` is several times as large. It needs a sparse kind.
        random_state: seed, RandomState or None.

    Attributes:
        n_components_: features after the projection.
        spec_: the `ProjectionSpec`, which defines S.
        components_: S as a float32 matrix [n_components_, n_features_in_], CSR for the sparse kinds. It is made when it
            is asked for, and not used: ``transform(X)`` equals ``X @ components_.T`` up to rounding.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        kind: str = "countsketch",
        nnz: int = 1,
        eps: float = 0.1,
        dense_output: bool = True,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.kind = kind
        self.nnz = nnz
        self.eps = eps
        self.dense_output = dense_output
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> RandomProjection:
        """Chooses the dimension and the seed; reads no more of ``X`` than its shape (and checks its numbers)."""
        X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype=[np.float32, np.float64])
        n_samples, n_features = X.shape
        dim = self.n_components
        if isinstance(dim, str):
            if dim != "auto":
                raise ValueError(f"n_components={dim!r}: give an integer or 'auto'")
            dim = int(johnson_lindenstrauss_min_dim(n_samples=n_samples, eps=self.eps))
            if dim > n_features:
                raise ValueError(
                    f"eps={self.eps} and n_samples={n_samples} lead to a target dimension of {dim} which is larger "
                    f"than the original space with n_features={n_features}: give n_components, or a larger eps"
                )
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        spec = ProjectionSpec(dim, kind=self.kind, seed=seed, size=n_features)  # type: ignore[arg-type]
        spec = dataclasses.replace(spec, nnz=self._nonzeros(spec.dim))
        self.spec_ = spec
        if spec.dim > n_features:
            warnings.warn(
                f"n_components={spec.dim} is higher than the number of features {n_features}: the dimensionality is "
                "not reduced",
                DataDimensionalityWarning,
                stacklevel=2,
            )
        if not self.dense_output and not spec.sparse:
            raise ValueError(
                f"dense_output={self.dense_output!r} with kind={self.kind!r}: every number of a row meets all "
                "components; give dense_output=True, or kind='countsketch' or 'sjlt'"
            )
        self.n_components_ = spec.dim
        return self

    def _nonzeros(self, dim: int) -> Any:
        """``nnz``, or ``dim`` where that is less: n_components=1 leaves a column no more."""
        if self.kind != "sjlt" or not isinstance(self.nnz, (int, np.integer)) or self.nnz <= dim:
            return self.nnz
        warnings.warn(
            f"nnz={self.nnz} is higher than n_components={dim}: a column has at most {dim} nonzeros, which are used",
            DataDimensionalityWarning,
            stacklevel=3,
        )
        return dim

    def transform(self, X: Any) -> Any:
        """[n_samples, n_components_] of a dense or sparse ``X`` [n_samples, n_features_in_], float32 or float64."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False, dtype=[np.float64, np.float32])
        if scipy.sparse.issparse(X):
            return self._transform_sparse(X)
        x = _tensor(X)
        out = torch.zeros(X.shape[0], self.n_components_, dtype=x.dtype, device="cpu")
        return project(x, self.spec_, out=out, backend=_backend(x)).numpy()

    def inverse_transform(self, X: Any) -> Any:
        """``S^T x``: [n_samples, n_features_in_], an unbiased reconstruction, ``E S^T S x = x``."""
        check_is_fitted(self)
        X = check_array(X, dtype=[np.float64, np.float32], accept_sparse=["csr", "csc"])
        if scipy.sparse.issparse(X):
            X = X.toarray()
        if X.dtype == np.float32:
            return project_transpose(
                _tensor(np.ascontiguousarray(X)), self.spec_, self.n_features_in_
            ).numpy()
        out = np.empty((X.shape[0], self.n_features_in_))
        step = max(1, _CHUNK // self.n_components_)
        for start in range(0, out.shape[1], step):
            stop = min(start + step, out.shape[1])
            out[:, start:stop] = (self._columns(start, stop, np.float64) @ X.T).T
        return out

    @property
    def components_(self) -> Any:
        """float32 [n_components_, n_features_in_]: S."""
        if not hasattr(self, "spec_"):
            raise AttributeError("components_ is there after fit: call fit first")
        return self._columns(0, self.n_features_in_, np.float32).T

    def _columns(self, start: int, stop: int, dtype: Any) -> Any:
        """Columns of S as rows: [stop - start, n_components_], CSR for the sparse kinds."""
        spec, n = self.spec_, stop - start
        if spec.sparse:
            bucket, sign = coordinates(spec, np.arange(start, stop, dtype=np.uint64))
            values = (sign.T * np.float64(spec.scale)).astype(dtype).ravel()
            starts = np.arange(0, n * spec.nnz + 1, spec.nnz)
            return scipy.sparse.csr_matrix((values, bucket.T.ravel(), starts), shape=(n, spec.dim))
        eye, rows = torch.eye(_AT_ONCE, dtype=torch.float32, device="cpu"), []
        for first in range(start, stop, _AT_ONCE):  # the rows of an identity share their draws
            m = min(_AT_ONCE, stop - first)
            rows.append(project(eye[:m, :m], spec, first).numpy())
        return np.concatenate(rows).astype(dtype, copy=False)

    def _transform_sparse(self, X: Any) -> Any:
        spec = self.spec_
        if spec.sparse:
            X = X.tocsr()
            rows = CsrRows(_tensor(X.indptr), _tensor(X.indices), _tensor(X.data), X.shape[1])
            if self.dense_output:
                return project_csr(rows, spec).numpy()
            y = project_csr_sparse(rows, spec)
            content = (y.values.numpy(), y.columns.numpy(), y.starts.numpy())
            return scipy.sparse.csr_matrix(content, shape=(X.shape[0], spec.dim))
        step, columns = max(128, _CHUNK // X.shape[0]), X.tocsc()
        total = torch.zeros(X.shape[0], spec.dim, dtype=_tensor(X.data).dtype, device="cpu")
        for start in range(0, X.shape[1], step):
            piece = _tensor(columns[:, start : start + step].toarray())
            project(piece, spec, start, out=total, backend=_backend(piece))
        return total.numpy()

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _tensor(array: Any) -> torch.Tensor:
    """A tensor over the array's memory, which is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _backend(x: torch.Tensor) -> str | None:
    """float64 rows are projected in float64 where that is said by name."""
    return "cpu" if x.dtype == torch.float64 else None
