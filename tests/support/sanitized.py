"""A pytest plugin (``-p support.sanitized``): the tests run on the module ``_C`` that ``CROPI_SANITIZED`` names.

scripts/sanitize.sh builds that module and sets the variable. Processes that a test starts run on the installed one.
"""

from __future__ import annotations

import importlib.util
import os
import sys

path = os.environ["CROPI_SANITIZED"]
spec = importlib.util.spec_from_file_location("cropi_kernels._C", path)
assert spec is not None and spec.loader is not None, path
module = importlib.util.module_from_spec(spec)
sys.modules["cropi_kernels._C"] = module
spec.loader.exec_module(module)


def pytest_report_header() -> str:
    from cropi_kernels import _native

    assert _native.native().__file__ == path, "another module was loaded before this one"
    return f"cropi_kernels._C: {path}"
