"""The worker and the driver of a Ray job without Ray: numbers in any order, and actors that die at chosen instants."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import content, equal

from cropi.cli import main
from cropi.distributed import ray as on_ray
from cropi.distributed.ray_worker import Worker
from cropi.errors import CropiError, RecordError
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.parts import take_parts
from cropi.store.store import SketchStore
from cropi.trainers.dumps.fields import REMEDY, BadSample
from cropi_kernels import SketchSpec


class Died(Exception):
    """An actor is dead."""


class Raised(Exception):
    """What Ray wraps an actor's own error in."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Ref:
    """A result that is asked for later."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run


class FakeRay:
    """Actors that run in this process, when their results are asked for. ``dies(worker, method, arguments)`` says when
    one dies."""

    exceptions = SimpleNamespace(RayTaskError=Raised, RayError=Died)

    def __init__(self, slots: int, dies: Callable[[int, str, Any], bool] = lambda *call: False) -> None:
        self.slots, self.dies, self.actors = slots, dies, 0
        self.killed: set[int] = set()

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Resources": {"CPU": float(self.slots)}},
            {"Alive": False, "Resources": {"CPU": 9.0}},
        ]

    def remote(self, kind: Any) -> Any:
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda make: self.actor(kind(make)))
        )

    def actor(self, worker: Any) -> Any:
        number, self.actors = self.actors, self.actors + 1
        held = SimpleNamespace(worker=worker, dead=False, number=number)

        def call(name: str) -> Any:
            def run(arguments: tuple[Any, ...]) -> Any:
                if held.dead or self.dies(number, name, arguments):
                    held.dead = True
                    raise Died(f"actor {number} has died")
                try:
                    return getattr(worker, name)(*arguments)
                except ValueError as error:
                    raise Raised(pickle.loads(pickle.dumps(error))) from error

            return SimpleNamespace(remote=lambda *arguments: Ref(lambda: run(arguments)))

        return SimpleNamespace(
            **{name: call(name) for name in ("prepare", "here", "begin", "work", "finish")}, held=held
        )

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: Any) -> Any:
        return ref.run()

    def kill(self, actor: Any) -> None:
        self.killed.add(actor.held.number)
        if actor.held.worker.part.store is not None:
            # Its store is closed, as the end of a process would close it.
            actor.held.worker.part.numbers.put(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lines(tmp_path / "t.jsonl", make_records(60))
    policy, job = make(tmp_path, "whole")
    sketch(policy, job, progress=False)
    return tmp_path


def make(folder: Path, out: str, **changes: Any) -> tuple[Policy, SketchJob]:
    given = {"tokens_per_batch": 24, "verify": False, "behaviour_check": "off"} | changes
    job = SketchJob([folder / "t.jsonl"], folder / out, SketchSpec(dim=1024), **given)
    return Policy(make_model(), make_tokenizer()), job


def on_fake(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ray: FakeRay, make_job: Any = make, **options: Any
) -> Any:
    monkeypatch.setattr(on_ray, "UNLOCKING", 10.0)
    monkeypatch.setattr(
        on_ray, "optional", lambda name: ray if name == "ray" else __import__("tqdm.auto").auto
    )
    return on_ray.sketch(lambda: make_job(folder, "out"), folder / "out", progress=False, **options)


@pytest.mark.long
def test_a_worker_computes_chunks_in_any_order(folder: Path) -> None:
    worker = Worker(lambda: make(folder, "out"))
    found = worker.prepare()
    assert found.total == 60 and found.tokens_per_batch == 24
    with SketchStore.create(folder / "out", found.manifest) as store:
        assert worker.begin(folder / "out", 0, found.manifest, 24).startswith("0 prompts, ")
        last = next(number for number in range(100) if worker.work(number) is None)
        assert last > 4
        worker.finish()
        assert take_parts(store) == 60
    assert equal(content(folder / "whole"), content(folder / "out"))

    worker = Worker(lambda: make(folder, "again"))
    with SketchStore.create(folder / "again", worker.prepare().manifest) as store:
        worker.begin(folder / "again", 7, found.manifest, 24)
        told = {}
        for number in (last - 1, 0, last + 5, 2, 1, last, *range(3, last - 1)):
            cuts = worker.work(number)
            assert (cuts is None) == (number >= last), number
            told |= cuts or {}
        assert len(told) == 1 and len(told[0]) == 32, "each window is told once"
        summary = worker.finish()
        assert summary.sketched + summary.skipped.total() == 60 == take_parts(store)
    assert equal(content(folder / "whole"), content(folder / "again"))


@pytest.mark.long
@pytest.mark.parametrize("instant", ["before", "in between", "at the end"])
def test_chunks_of_dead_workers_are_put_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    died: list[tuple[int, str]] = []

    def dies(worker: int, method: str, arguments: Any) -> bool:
        now = {
            "before": worker == 0 and method == "prepare",
            "in between": method == "work" and worker < 2 and arguments[0] in (2, 3),
            "at the end": worker == 1 and method == "finish",
        }[instant]
        if now:
            died.append((worker, method))
        return now

    ray = FakeRay(2, dies)
    summary = on_fake(folder, monkeypatch, ray)
    assert died and ray.actors == 2 + (len(died) if instant != "at the end" else 0), "each is replaced"
    assert equal(content(folder / "whole"), content(folder / "out"))
    assert summary.sketched + summary.skipped.total() == 60 and not list((folder / "out").glob("part-*"))
    again = on_fake(folder, monkeypatch, FakeRay(3))
    assert again.resumed == 60 and again.sketched == 0


@pytest.mark.long
def test_a_chunk_that_kills_every_worker_ends_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(2, lambda worker, method, arguments: method == "work" and arguments[0] == 3)
    with pytest.raises(
        CropiError, match=r"died over chunk 3, as 2 others did \(actor . has died\).*smaller --tokens"
    ):
        on_fake(folder, monkeypatch, ray)
    with pytest.raises(CropiError, match="died before it did any work"):
        on_fake(folder, monkeypatch, FakeRay(1, lambda worker, method, arguments: method == "prepare"))
    assert on_fake(folder, monkeypatch, FakeRay(1)).resumed > 0, "finished rows are kept"
    assert equal(content(folder / "whole"), content(folder / "out"))


@pytest.mark.long
def test_workers_that_die_while_they_have_nothing_to_do_are_not_held_against_a_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers die over the last chunk, and all others, which are idle, at the same time."""
    asked: list[int] = []

    def alone(worker: int, method: str, arguments: Any) -> bool:
        asked.extend(arguments if method == "work" else ())
        return False

    on_fake(folder, monkeypatch, FakeRay(1, alone))
    last, deaths, found = max(asked) - 1, 0, 0
    idle: set[int] = set()

    def dies(worker: int, method: str, arguments: Any) -> bool:
        nonlocal deaths, found
        if deaths < 2 and method == "work" and arguments[0] == last:
            deaths += 1
            return True
        if method == "work" and arguments[0] > last:
            idle.add(worker)
            return False
        dead = deaths == 2 and worker in idle and method != "finish"
        found += dead
        return dead

    shutil.rmtree(folder / "out")
    ray = FakeRay(4, dies)
    summary = on_fake(folder, monkeypatch, ray)
    assert deaths == 2 and found and ray.actors == 4 + 2 + found, (
        "those that were found dead are replaced, too"
    )
    assert summary.sketched + summary.skipped.total() == 60
    assert equal(content(folder / "whole"), content(folder / "out"))


@pytest.mark.long
def test_what_a_worker_finds_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(folder: Path, out: str) -> tuple[Policy, SketchJob]:
        policy, job = make(folder, out)
        return policy, SketchJob(**(vars(job) | {"trajectories": [folder / "none.jsonl"]}))

    with pytest.raises(CropiError, match="worker 0 of Ray failed: .*none.jsonl"):
        on_fake(folder, monkeypatch, FakeRay(2), bad)
    count = 0

    def other(folder: Path, out: str) -> tuple[Policy, SketchJob]:
        nonlocal count
        count += 1
        return make(folder, out, max_length=40 + count)

    with pytest.raises(
        CropiError, match=r"tokens.max_length = 42 there, 41 in the first worker; start all processes"
    ):
        on_fake(folder, monkeypatch, ray := FakeRay(2), other)
    assert ray.killed == {0, 1}, "a traceback that somebody keeps would keep an actor, and its GPU"
    assert not list((folder / "out").rglob("shard-*"))
    with pytest.raises(CropiError, match="no node of the Ray cluster has a free CPU"):
        on_fake(folder, monkeypatch, FakeRay(0), device="cpu")
    with pytest.raises(CropiError, match="worker 0 of Ray failed: shard 1/2 .* leave it out"):
        on_fake(folder, monkeypatch, FakeRay(2), lambda *where: make(*where, shard=(1, 2)))
    for count in (0, -1):
        with pytest.raises(CropiError, match=f"workers must be at least 1, got {count}"):
            on_fake(folder, monkeypatch, FakeRay(2), workers=count)


class Unpicklable(OSError):
    """An error of another package."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}:{line} is cut")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RecordError("t.jsonl:3", "'rewards' is missing"), "t.jsonl:3: 'rewards' is missing; mend"),
        (BadSample("s.pt", "tokens", "are missing"), "s.pt, tokens: are missing"),
        (Unpicklable("m.safetensors", 3), "Unpicklable: m.safetensors:3 is cut"),
        (KeyError("lm_head"), "KeyError: 'lm_head'"),
    ],
)  # fmt: skip
def test_every_error_of_a_worker_reaches_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def bad(folder: Path, out: str) -> tuple[Policy, SketchJob]:
        raise error

    with pytest.raises(CropiError, match=f"^worker 0 of Ray failed: {words}"):
        on_fake(tmp_path, monkeypatch, FakeRay(2), bad)


def test_an_error_keeps_what_it_says_of_itself() -> None:
    made = pickle.loads(pickle.dumps(BadSample("s.pt", "tokens", "are missing")))
    assert type(made) is BadSample and (made.field, made.problem) == ("tokens", "are missing")
    assert str(copy.copy(made)) == str(made) == "s.pt, tokens: are missing; " + REMEDY


@pytest.mark.long
def test_an_interrupt_between_two_chunks_of_a_worker_keeps_its_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(finished: int, pids: Any) -> None:
        if finished == 3:
            raise KeyboardInterrupt

    summary = on_fake(folder, monkeypatch, ray := FakeRay(2), on_chunk=interrupt)
    assert summary.interrupted and summary.sketched > 0 and ray.killed == {0, 1}
    assert on_fake(folder, monkeypatch, FakeRay(2)).resumed == summary.sketched + summary.skipped.total()
    assert equal(content(folder / "whole"), content(folder / "out"))


def test_two_ways_to_share_a_job_are_one_too_many(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["sketch", "--model", "m", "--trajectories", "t", "--out", "o"]
    assert main([*words, "--ray", "auto", "--shard", "1/2"]) == 2
    assert "--ray auto and --shard are two ways to share one job" in capsys.readouterr().err
    assert main([*words, "--workers", "2"]) == 2
    assert "--workers 2 is for --ray ADDRESS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("local", Exception("timed out"), r"could be started here \(timed out\); try once more"),
        ("h:1", ConnectionError("refused"), r"at 'h:1' \(refused\); start one, or give local"),
    ],
)
def test_a_cluster_that_does_not_come_up_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, error: Exception, words: str
) -> None:
    """Ray raises a bare Exception where the node that it starts is too slow: it ended in a traceback."""

    def init(**options: Any) -> None:
        raise error

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(on_ray, "optional", lambda name: ray)
    with pytest.raises(CropiError, match=words):
        on_ray.sketch(lambda: make(tmp_path, "out"), tmp_path / "out", address=address)
