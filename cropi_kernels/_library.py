"""The ``cropi`` operator namespace: one library object, to which every op folder adds its schemas and kernels."""

from __future__ import annotations

import torch

NAMESPACE = "cropi"
LIB = torch.library.Library(NAMESPACE, "DEF")  # kept alive here: its ops vanish with it
