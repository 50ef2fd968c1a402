"""Training steps of two gloo ranks: each sketches its own rows, and together they are the step's."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launch import on_ranks

WORKER = Path(__file__).parents[1] / "support" / "live_ranks.py"
# The weights of the second step are averages of gradients, which one process and two add up in another order; so are
# sums over rows. Some ten float32 additions differ.
ROUNDING = 64 * 2.0**-24


@pytest.mark.slow
def test_ranks_sketch_their_own_rows() -> None:
    """Before gradients are averaged (DistributedDataParallel) or sharded (FSDP2). The parts of a prompt that two ranks
    share add up, and so does an update that gathers them."""
    ranks = on_ranks(WORKER)
    for way in ("ddp", "fsdp2"):
        for one in (rank[way] for rank in ranks):
            assert one["loss"] == "a sum over prompts" and one["weights"], (way, "the step keeps its bits")
            assert one["own"] <= ROUNDING and one["sum"] <= ROUNDING, (way, one)
            together, alone = one["scores"]
            assert together == pytest.approx(alone, abs=1e-3) and one["origin"], way
        assert ranks[0][way]["scores"] == ranks[1][way]["scores"], way
