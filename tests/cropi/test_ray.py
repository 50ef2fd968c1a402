"""A job on a Ray cluster of two nodes that loses a worker and then a node. Runs where ray is: `make test-ray`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_records, save_policy, write_lines
from support.ray_jobs import make, of_its_own
from support.stores import content, equal, sketches_of

from cropi.cli import main
from cropi.distributed import ray as on_ray
from cropi.errors import CropiError
from cropi.sketching.run import sketch
from cropi.store.manifest import MANIFEST
from cropi.store.store import SketchStore

ray: Any = pytest.importorskip("ray", reason="ray is not installed: make test-ray")
utils: Any = pytest.importorskip("ray.cluster_utils")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU slot each; the head has none, so that it cannot be the one that goes."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # on a busy machine it would kill workers
    small = {"object_store_memory": 80 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": False, **small}
    made = utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        made.nodes = [made.add_node(num_cpus=1, **small) for _ in range(2)]  # type: ignore[attr-defined]
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray")
    save_policy(path / "m")
    write_lines(path / "t.jsonl", make_records(150))
    policy, job = make(path, "whole")
    sketch(policy, job, progress=False)
    return path


def test_a_worker_is_killed_and_a_node_goes(cluster: Any, folder: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    killed: list[int] = []

    def on_chunk(done: int, workers: list[int]) -> None:
        if done == 3:
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)
        if done == 8:
            killed.append(0)
            cluster.remove_node(cluster.nodes[1], allow_graceful=False)

    summary = on_ray.sketch(
        partial(make, folder, "out"), folder / "out", device="cpu", on_chunk=on_chunk, progress=False
    )
    assert len(killed) == 2 and killed[0]
    assert equal(content(folder / "whole"), content(folder / "out"))
    store = SketchStore.open(folder / "out")
    store.check_finished()
    assert summary.sketched + summary.skipped.total() == 150 and summary.resumed == 0
    assert not list((folder / "out").glob("part-*"))


def test_a_job_goes_on_and_a_bad_one_is_named(
    cluster: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, on the node that is left."""
    words = [
        "sketch", "--ray", cluster.address, "--model", str(folder / "m"), "--dim", "1024", "--tokens-per-batch",
        "40", "--no-verify", "--behaviour-check", "off", "--device", "cpu", "--no-progress", "--out",
        str(folder / "cut"), "--trajectories", str(folder / "t.jsonl"),
    ]  # fmt: skip
    whole = SketchStore.open(folder / "whole")
    vectors = sketches_of(whole)
    with SketchStore.create(folder / "cut", whole.manifest) as store:
        for row in whole.rows()[:60]:
            store.add(row, vectors.get(row.id))
    assert main(words) == 0
    assert equal(content(folder / "whole"), content(folder / "cut"))
    assert "60 from before" in capsys.readouterr().out
    assert main([*words[:-1], str(folder / "none.jsonl")]) == 2
    assert "worker 0 of Ray failed: " in capsys.readouterr().err


def test_workers_that_differ_are_named(cluster: Any, folder: Path) -> None:
    with pytest.raises(CropiError, match="device must be auto, cuda or cpu"):
        on_ray.sketch(partial(make, folder, "x"), folder / "x", address=cluster.address, device="cuda:1")
    with pytest.raises(CropiError, match="no node of the Ray cluster has a GPU"):
        on_ray.sketch(partial(make, folder, "x"), folder / "x", address=cluster.address, device="cuda")
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    with pytest.raises(
        CropiError, match=r"worker . \(pid .*\) does not have the same job as the first worker: traj"
    ):
        on_ray.sketch(partial(of_its_own, folder, "x"), folder / "x", address=cluster.address, progress=False)
    # Who came first may have worked before another one came; who differs may not.
    stores = [SketchStore.open(path.parent) for path in (folder / "x").rglob(MANIFEST)]
    assert len({row.id.partition("-")[0] for store in stores for row in store.rows()}) <= 1
