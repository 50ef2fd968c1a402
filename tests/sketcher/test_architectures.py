"""Every causal architecture of the installed transformers that builds small: `policy_gradient`, `batch` and fused taps
against plain float64 autograd, one response at a time. Right to rounding, or an error that support/refusals.py expects.

A family that is new in transformers is in neither, and shows itself here.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from support import architectures
from support.refusals import NOT_SMALL, REFUSED

from cropi_kernels import GradientSketcher

transformers.logging.set_verbosity_error()
# Of float32 passes through two layers: norms of rows near 0 and exponentials amplify its rounding.
BOUND = 2e-4
NOTHING = "has no RMSNorm and no SwiGLU that is known here"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", architectures.NAMES)
def test_architecture(name: str) -> None:
    with architectures.time_box(architectures.SECONDS):
        try:
            model = architectures.small(name)
        except architectures.NotSmall as error:
            assert name in NOT_SMALL, f"{name} does not build small any more, or is new: {error}"
            pytest.skip(f"not built small: {error}")
        assert name not in NOT_SMALL, f"{name} builds small: take it off the table"
        refused = REFUSED.get(name, {})
        want = None
        for way in ("policy_gradient", "batch", "fused"):
            try:
                with GradientSketcher(model, architectures.SPEC, fused=way == "fused") as sketcher:
                    if way == "batch":
                        got = architectures.by_batch(sketcher, model)
                    else:
                        got = architectures.by_policy_gradient(sketcher)
            except ValueError as error:
                if way == "fused" and ("policy_gradient" in refused or NOTHING in str(error)):
                    continue
                assert way in refused and refused[way] in str(error), f"{way}: {error}"
                continue
            assert way not in refused, f"{way} is refused no longer: take it off the table"
            want = architectures.exact(name) if want is None else want
            error_of = (got - want).norm(dim=1) / want.norm(dim=1)
            assert want.any(dim=1).all() and bool((error_of <= BOUND).all()), (way, error_of.tolist())
    assert torch.is_grad_enabled()
