"""The directions of validation sets, from the sketches of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def directions(rows: torch.Tensor, names: Sequence[str]) -> tuple[list[torch.Tensor], list[str]]:
    """The mean of every set at length 1, float32 ``[dim]``, in order of name, and of sets without one why, in words.

    Args:
        rows: float32 ``[n, dim]``; those that are not finite, or zero, are left out.
        names: the set of each row; where there is none, the set ``valid`` has no row.
    """
    made, problems = list[torch.Tensor](), list[str]()
    for name in sorted(set(names)) or ["valid"]:
        mine = rows[torch.tensor([other == name for other in names], dtype=torch.bool, device="cpu")]
        finite = mine.isfinite().all(dim=1)
        usable = mine[finite & (mine != 0).any(dim=1)].double()
        mean = usable.sum(dim=0) / max(len(usable), 1)
        if float(mean.norm()) > 0:
            made.append((mean / mean.norm()).float())
            continue
        broken = len(mine) - int(finite.sum())
        why = f"its {len(mine)} rows are all zero"
        if len(usable):
            why = f"its {len(usable)} rows add up to zero"
        elif broken:
            why = f"{broken} of its {len(mine)} rows are not finite, the others zero"
        problems.append(f"validation set {name!r} has no gradient ({why})")
    return made, problems
