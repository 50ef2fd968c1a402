"""The options of the adapters, from slime's arguments or the environment.

slime's ``--custom-config-path FILE.yaml`` makes arguments of any keys; every option may be one of them, or an
environment variable of every worker (``ray job submit --runtime-env-json``):

===================  ====================  ===============================================================
argument             variable
===================  ====================  ===============================================================
``cropi_selection``  ``CROPI_SELECTION``   the selection to train on, which may be replaced while it runs
``cropi_record``     ``CROPI_RECORD``      folder of the recorded rollouts
``cropi_id_key``     ``CROPI_ID_KEY``      key of a sample's metadata with the prompt's id (default ``id``)
===================  ====================  ===============================================================
"""

from __future__ import annotations

import os
from typing import Any

from cropi.errors import CropiError

DEFAULTS = {"selection": None, "record": None, "id_key": "id"}


def option(args: Any, name: str, what: str) -> str:
    """One option.

    Raises:
        CropiError: it is not given, or no text.
    """
    variable = f"CROPI_{name.upper()}"
    value = getattr(args, f"cropi_{name}", None) or os.environ.get(variable) or DEFAULTS[name]
    if value is None:
        raise CropiError(f"{what}: set cropi_{name} in --custom-config-path, or ${variable}")
    if not isinstance(value, str):
        raise CropiError(f"{what}: cropi_{name} must be text, got {value!r:.100}")
    return value
