"""One job on several processes: the store of one, whatever happens to whom. Here the processes are threads."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import content, equal, sketches_of

from cropi.cli import main
from cropi.data.readers import read
from cropi.distributed import ranks
from cropi.distributed.launch import Launched, launched
from cropi.distributed.team import RankFailed, Team
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.ranking.table import read_scores
from cropi.ranking.uncertainty import Uncertainty
from cropi.sketching import chunks as chunks_module
from cropi.sketching.job import SketchJob
from cropi.sketching.noise import sketch_noise
from cropi.sketching.run import scan_groups, sketch
from cropi.sketching.summary import Summary
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

KILLED = Path(__file__).parents[1] / "support" / "killed_ranks.py"


def policies(count: int) -> list[Policy]:
    """One for each rank; made one after the other, as they share torch's random numbers."""
    return [Policy(make_model(), make_tokenizer()) for _ in range(count)]


def policy_of() -> Policy:
    return policies(1)[0]


def job_of(folder: Path, out: str, **changes: Any) -> SketchJob:
    given: dict[str, Any] = dict(tokens_per_batch=24, shard_rows=2, behaviour_check="off", verify=False)
    given |= {"trajectories": [folder / "t.jsonl"], "spec": SketchSpec(dim=1024)}
    return SketchJob(**(given | {"out": folder / out} | changes))


def on_ranks(world: int, work: Callable[[Team], Any], silence: float = 60.0) -> list[Any]:
    """The result or the error of every rank."""
    store, results = dist.HashStore(), [None] * world

    def run(rank: int) -> None:
        team = Team(store, rank, world, silence=silence)
        try:
            with team.telling():
                results[rank] = work(team)
        except BaseException as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank waits for ever"
    return results


def together(folder: Path, out: str, world: int, **changes: Any) -> list[Any]:
    made = policies(world)
    return on_ranks(
        world,
        lambda team: ranks.sketch(team, made[team.rank], job_of(folder, out, **changes), progress=False),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lines(tmp_path / "t.jsonl", make_records(48))
    sketch(policy_of(), job_of(tmp_path, "whole"), progress=False)
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize(
    "longest, dtype",
    [(1, "float32"), (4, "int8")],
    ids=["prompts cut between chunks", "at ends of batches, int8"],
)
def test_the_store_of_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, longest: int, dtype: str
) -> None:
    monkeypatch.setattr(chunks_module, "LONGEST", longest)
    if dtype != "float32":
        sketch(policy_of(), job_of(folder, "whole-8", store_dtype=dtype), progress=False)
        (folder / "whole").rename(folder / "whole-32")
        (folder / "whole-8").rename(folder / "whole")
    found = together(folder, "out", 3, store_dtype=dtype)
    assert all(isinstance(one, Summary) for one in found), found
    assert equal(content(folder / "whole"), content(folder / "out"))
    store = SketchStore.open(folder / "out")
    store.check_finished()
    assert found[0].store is not None and found[1].store is None and not list((folder / "out").glob("part-*"))
    first = found[0]
    assert first.sketched + first.skipped.total() == 48 == first.read and first.resumed == 0
    assert found[1].sketched == found[2].sketched == first.sketched
    again = together(folder, "out", 2, store_dtype=dtype)
    assert again[0].resumed == 48 and again[0].sketched == 0


@pytest.mark.long
def test_noise_of_some_prompts_is_that_of_one_process(folder: Path) -> None:
    groups = read([folder / "t.jsonl"])
    scan = scan_groups(policy_of(), job_of(folder, "n"), groups)
    drawn = [row.id for row in SketchStore.open(folder / "whole").rows() if row.status == "ok"][1::2]
    sketch_noise(policy_of(), job_of(folder, "n-one", trajectories=groups), scan, of=drawn, progress=False)
    made = policies(2)

    def work(team: Team) -> Summary:
        job = job_of(folder, "n-two", trajectories=groups)
        by = functools.partial(ranks.sketch, team)
        return sketch_noise(made[team.rank], job, scan, of=drawn, progress=False, by=by)

    found = on_ranks(2, work)
    assert all(isinstance(one, Summary) for one in found), found
    assert equal(content(folder / "n-one"), content(folder / "n-two"))
    held = SketchStore.open(folder / "n-two")
    assert (
        [row.id for row in held.rows()] == drawn and held.manifest["noise"] is True and found[0].sketched > 3
    )


@pytest.mark.long
def test_who_is_slow_takes_less(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[int, int] = {0: 0, 1: 0}
    take = ranks.Claimed.take

    def slow(self: ranks.Claimed, chunks: Any) -> Any:
        for chunk in take(self, chunks):
            time.sleep(0.3 if self.team.rank else 0.0)
            rows[self.team.rank] += len(chunk.prompts)
            yield chunk

    monkeypatch.setattr(ranks.Claimed, "take", slow)
    together(folder, "out", 2)
    assert equal(content(folder / "whole"), content(folder / "out"))
    assert 0 < rows[1] < rows[0], rows


@pytest.mark.long
def test_an_error_of_one_rank_ends_all_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = SketchStore.add
    left = 3

    def breaking(store: SketchStore, *row: Any) -> list[str]:
        nonlocal left
        if store.path.name == "part-00001":
            left -= 1
            if left < 0:
                raise CropiError("the disk of rank 1 is full")
        return add(store, *row)

    monkeypatch.setattr(SketchStore, "add", breaking)
    found = together(folder, "out", 3)
    assert str(found[1]) == "the disk of rank 1 is full"
    assert all(
        isinstance(found[i], RankFailed) and "rank 1 failed: the disk" in str(found[i]) for i in (0, 2)
    ), found
    monkeypatch.setattr(SketchStore, "add", add)
    kept = sum(len(SketchStore.open(path)) for path in (folder / "out").glob("part-*"))
    assert 3 <= kept < 48
    (two,) = {(one.resumed, one.sketched + one.skipped.total()) for one in together(folder, "out", 2)}
    assert two == (kept, 48 - kept)
    assert equal(content(folder / "whole"), content(folder / "out"))


@pytest.mark.long
def test_one_process_goes_on_with_what_many_began(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rows of a process that was thought dead are not taken twice."""
    whole = SketchStore.open(folder / "whole")
    parts = {0: range(0, 20), 1: range(10, 30)}  # the rows 10 to 19 are in both
    vectors = sketches_of(whole)
    SketchStore.create(folder / "out", whole.manifest).close()
    for number, places in parts.items():
        path = folder / "out" / f"part-{number:05d}"
        with SketchStore.create(path, whole.manifest, shard_rows=3) as store:
            for row in [whole.rows()[i] for i in places]:
                store.add(row, vectors.get(row.id))
    (folder / "out" / "part-00002").mkdir()
    summary = sketch(policy_of(), job_of(folder, "out"), progress=False)
    assert summary.resumed == 30 and equal(content(folder / "whole"), content(folder / "out"))
    assert not list((folder / "out").glob("part-*"))


@pytest.mark.long
def test_a_part_that_is_written_to_is_left_alone(folder: Path) -> None:
    whole = SketchStore.open(folder / "whole")
    SketchStore.create(folder / "out", whole.manifest).close()
    with SketchStore.create(folder / "out" / "part-00003", whole.manifest):
        found = together(folder, "out", 2)
    assert "another process (pid" in str(found[0]) and "part-00003" in str(found[0])
    assert isinstance(found[1], RankFailed)


# ------------------------------------------------------------------------------------------ ranks that differ
def differing(folder: Path, **of_rank_1: Any) -> str:
    """What rank 0 says where rank 1 of three has something else; nothing may have been computed."""
    policy = of_rank_1.pop("policy", None)
    made = policies(3)
    made[1] = policy or made[1]

    def work(team: Team) -> Any:
        job = job_of(folder, "out", **(of_rank_1 if team.rank == 1 else {}))
        return ranks.sketch(team, made[team.rank], job, progress=False)

    found = on_ranks(3, work)
    assert all(isinstance(one, CropiError) for one in found), found
    assert isinstance(found[2], RankFailed), "a rank that has what rank 0 has need not say it again"
    assert not list(folder.rglob("out*/**/shard-*"))
    return str(found[0])


@pytest.mark.long
def test_other_files_models_and_options_are_named_before_work(folder: Path) -> None:
    other = write_lines(folder / "other.jsonl", make_records(48, seed=1))
    message = differing(folder, trajectories=[other])
    assert "rank 1 does not have the same job as rank 0: trajectories = " in message
    assert "give all processes the same files" in message
    message = differing(folder, policy=Policy(make_model(seed=1), make_tokenizer()))
    assert "model.weights = 'xxh3:" in message and "give all processes the same model" in message
    assert "options.tokens_per_batch = 40 there, 24 in rank 0" in differing(folder, tokens_per_batch=40)
    message = differing(folder, spec=SketchSpec(dim=2048))
    assert "spec.dim = 2048 there, 1024 in rank 0; start all processes with the same options" in message
    assert "versions.torch" not in message


def test_shares_of_a_job_are_not_shared_again(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", make_records(8))
    made, job = policies(2), job_of(tmp_path, "out", shard=(1, 2))
    found = on_ranks(2, lambda team: ranks.sketch(team, made[team.rank], job, progress=False))
    assert all("shard 1/2" in str(one) and "leave it out" in str(one) for one in found), found
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_who_was_given_no_tokens_per_batch_takes_those_of_the_others(folder: Path) -> None:
    made = policies(2)

    def work(team: Team) -> Any:
        job = job_of(folder, "out", tokens_per_batch=(24, None)[team.rank])
        return ranks.sketch(team, made[team.rank], job, progress=False)

    found = on_ranks(2, work)
    assert all(isinstance(one, Summary) for one in found), found
    assert equal(content(folder / "whole"), content(folder / "out"))


@pytest.mark.long
def test_a_folder_that_is_not_shared_is_named(folder: Path) -> None:
    made = policies(2)

    def work(team: Team) -> Any:
        return ranks.sketch(team, made[team.rank], job_of(folder, f"out-{team.rank}"), progress=False)

    found = on_ranks(2, work)
    assert "there is no sketch store" in str(found[1]) and "rank 1 failed" in str(found[0])
    SketchStore.create(folder / "out-1", SketchStore.open(folder / "whole").manifest).close()
    sketch(policy_of(), job_of(folder, "out-0", limit=20), progress=False)
    found = on_ranks(2, work)
    assert "store = '0 prompts" in str(
        found[0]
    ) and "one folder, on a file system that all processes share" in str(found[0])


@pytest.mark.long
def test_other_cuts_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = chunks_module._digest

    def odd(batches: Any, rows: Any) -> str:
        return digest(batches, rows) + str(threading.get_ident())

    monkeypatch.setattr(chunks_module, "_digest", odd)
    found = together(folder, "out", 2)
    assert any("into other micro-batches than another rank" in str(one) for one in found)


# --------------------------------------------------------------------------------------------- the launcher's word
WORD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def test_who_is_launched() -> None:
    assert launched({}) is None and launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    found = launched(WORD | {"LOCAL_RANK": "0"})
    assert found is not None and (found.rank, found.world, found.local) == (1, 4, 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR not, so there is no process group"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": None}, "WORLD_SIZE=4, MASTER_ADDR=127.0.0.1, MASTER_PORT=29400 is set, but RANK not"),
        ({"WORLD_SIZE": None}, "but WORLD_SIZE not"),
        ({"RANK": "x"}, "RANK='x' is not an integer"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4 do not fit together"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not an integer"),
    ],
)
def test_half_a_launcher_is_named(change: dict[str, Any], words: str) -> None:
    given = {key: value for key, value in (WORD | change).items() if value is not None}
    with pytest.raises(CropiError, match=words) as caught:
        launched(given)
    assert "torchrun --nproc-per-node N -m cropi" in str(caught.value)


def test_others_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):  # who waits for the others, and who finds nobody
        for name, value in (WORD | {"RANK": rank, "MASTER_PORT": "29433"}).items():
            monkeypatch.setenv(name, value)
        found = launched()
        assert found is not None
        with pytest.raises(
            CropiError, match=f"RANK={rank} and WORLD_SIZE=4 are set, but 4 processes did not come"
        ):
            found.connect(0.3)


def test_processes_that_are_started_again_see_nothing_of_the_dead_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launcher keeps its list of keys over restarts: a claim of before would be a chunk that nobody computes."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = WORD | {"MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = launched()
    assert found is not None
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        monkeypatch.setattr("cropi.distributed.launch._connections", itertools.count())
        team = Team(found.connect(5), 1, 4)
        with team.telling():
            assert team.claim("job") == 0 and not team.stopped
            team.stop()
            assert team.stopped


def test_who_was_asked_to_stop_does_not_wait_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.distributed.team.STOPPING", 0.3)
    team = Team(dist.HashStore(), 1, 2)
    with (
        pytest.raises(RankFailed, match="stopped, without rank 0, which still works or is gone"),
        team.telling(),
    ):
        team.stop()
        team.gather(1)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Launched(5, 8, 1, WORD)
    for count, device in ((0, "cuda"), (1, "cuda"), (2, "cuda:1"), (8, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert one.device("cuda") == device
        assert one.device("auto") == ("auto" if device == "cuda" else device)
    assert one.device("cpu") == "cpu" and one.device("cuda:0") == "cuda:0"
    with pytest.raises(
        CropiError, match="rank 5 is process 9 of its machine, which has 8 GPUs; start at most"
    ):
        Launched(5, 16, 9, WORD | {"LOCAL_RANK": "9"}).device("cuda")
    found = launched(WORD | {"RANK": "9", "WORLD_SIZE": "16"})
    assert found is not None
    with pytest.raises(CropiError, match="rank 9: .* has 8 GPUs, and LOCAL_RANK .* not set; set it to"):
        found.device("cuda")


def test_a_rank_that_falls_silent_is_given_up() -> None:
    team = Team(dist.HashStore(), 1, 2, silence=0.3)
    with pytest.raises(CropiError, match="rank 0 has given no sign of life for"), team.telling():
        team.gather(1)


def test_calls_of_a_team() -> None:
    def work(team: Team) -> Any:
        for i in range(5):
            assert team.gather((team.rank, i)) == [(rank, i) for rank in range(3)]
        assert team.share("word" if team.first else None) == "word"
        assert sorted(team.gather([team.claim("job") for _ in range(4)])[0]) is not None
        numbers = [number for part in team.gather([team.claim("other") for _ in range(4)]) for number in part]
        assert sorted(numbers) == list(range(12))
        return team.agree(lambda: 1 if team.rank != 2 else 1 / 0)

    found = on_ranks(3, work)
    assert isinstance(found[2], ZeroDivisionError)
    assert all(str(found[i]) == "rank 2 failed: ZeroDivisionError: division by zero" for i in (0, 1))


# ---------------------------------------------------------------------------------------------- real processes
@pytest.mark.slow
def test_one_of_four_is_killed(tmp_path: Path) -> None:
    """At random instants, and the job goes on with another number of processes: no finished row is lost, none is there
    twice, and the others end in words. ``CROPI_KILLS=500`` tries it so often, at other instants with another
    ``CROPI_SEED``. Of two launchers that start one job at once, one is refused."""
    trials = os.environ.get("CROPI_KILLS", "3")
    words = [sys.executable, str(KILLED), str(tmp_path), trials, os.environ.get("CROPI_SEED", "7")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180 + 40 * int(trials))
    assert done.returncode == 0, done.stderr[-3000:]
    *ended, twice = [json.loads(line) for line in done.stdout.splitlines()]
    assert twice["statuses"] == [[0] * 4, [3] * 4] and twice["equal"], twice
    assert "is writing to the store" in twice["said"]
    assert len(ended) == int(trials)
    for found in ended:
        assert found["equal"] and found["left"] == 0, found
        assert found["resumed"] == found["kept"] and found["resumed"] + found["computed"] == found["whole"], (
            found
        )
        others = [status for rank, status in enumerate(found["statuses"]) if rank != found["victim"]]
        assert set(others) <= {0, 3}, found


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """`cropi run --noise` under torchrun: sketches, their noise, scores and selection of one process."""
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    write_lines(tmp_path / "t.jsonl", make_records(40))
    write_lines(tmp_path / "v.jsonl", make_records(20, seed=3))
    words = [
        "run", "--model", str(tmp_path / "m"), "--train", str(tmp_path / "t.jsonl"), "--valid",
        str(tmp_path / "v.jsonl"), "--dim", "1024", "--tokens-per-batch", "48", "--no-progress", "--no-report",
        "--noise",
    ]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cropi"]
    done = subprocess.run(
        [*torchrun, *words, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("== results") == 1, "rank 0 alone speaks"
    for name in ("train", "valid", "noise-train", "noise-valid"):
        one, two = (tmp_path / out / "sketches" / name for out in ("one", "two"))
        assert equal(content(one), content(two))
    alone, shared = (Uncertainty.of(read_scores(tmp_path / out / "scores.parquet")) for out in ("one", "two"))
    assert alone is not None and shared is not None and alone.own_signal < 1
    # The rows of two processes come in another order, and are summed in it.
    assert shared.own_signal == pytest.approx(alone.own_signal, rel=1e-9)
    assert shared.sets[0].own == pytest.approx(alone.sets[0].own, rel=1e-9)
    chosen = [(tmp_path / out / "selected.jsonl").read_text() for out in ("one", "two")]
    assert chosen[0] == chosen[1] and chosen[0].count("\n") == 4
    assert len(list(read([tmp_path / "two" / "selected_trajectories.jsonl"]))) == 4
