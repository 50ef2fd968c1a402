"""Runs the parts of the GPU suite, in order of value, and keeps what they measured after every one of them.

A GPU is often lent for minutes, on a machine that keeps nothing. So every part has a limit, the limits of a call add up
to its budget, rows leave the machine in one archive after every part, and a later call goes on from that archive.
`benchmarks/gpu_suite.sh` says how to call it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("benchmarks") / "gpu"
BUDGET_S = 540.0
TABLE_S = 5.0  # of the table at the end
RESTART = 75  # as common.RESTART, which imports torch
MOST_RESTARTS = 8
LOG_BYTES = 256 << 10  # of a log, its end; the archive must stay below 16 MB


@dataclasses.dataclass(frozen=True)
class Part:
    """``seconds``: its limit. ``processes`` share its attempts, where nothing is timed. ``needs``: what must be built
    before, in every call, since the next machine is bare."""

    name: str
    seconds: float
    command: tuple[str, ...]
    processes: int = 1
    needs: tuple[str, ...] = ("build", "warm")


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, str(HERE / f"{name}.py"), *arguments


def shell(*words: str) -> tuple[str, ...]:
    return "bash", str(HERE / "build.sh"), *words


BUILDS = (
    Part("build", 55, shell("build"), needs=()),
    Part("warm", 45, script("warm"), processes=10, needs=("build",)),
    Part("cuda", 65, shell("cuda"), needs=("build",)),
)
PROJECT = ("build", "cuda")
# In order of value: what no GPU has run comes first, then what has not run since the kernels changed. The first eight
# fill one call; on an H200 such parts took half of their limits.
MEASURED = (
    Part("new", 90, script("new"), processes=8, needs=("build",)),
    Part("variants", 85, script("variants")),
    Part("counters", 25, shell("counters")),
    Part("first", 35, script("first")),
    Part("passes", 45, script("passes")),
    Part("correctness", 60, script("correctness"), processes=12, needs=("build",)),
    Part("sketch", 35, script("sketch")),
    Part("model", 60, script("model")),
    Part("logprob", 50, script("logprob")),
    Part("new_times", 110, script("new", "times")),
    Part("jobs", 180, script("jobs"), needs=("build",)),
    Part("model_7b", 75, script("model", "7b")),
    Part("model_moe", 80, script("model", "moe")),
    Part("project_correctness", 35, script("project_correctness"), processes=4, needs=PROJECT),
    Part("project", 30, script("project"), needs=PROJECT),
    Part("sanitizer_memcheck", 35, shell("sanitize", "memcheck", "correctness"), 2, needs=("build",)),
    Part("sanitizer_racecheck", 65, shell("sanitize", "racecheck", "correctness"), 5, needs=("build",)),
)
PARTS = {part.name: part for part in BUILDS + MEASURED}


def that_fit(wanted: Sequence[Part], budget: float, ran: Sequence[Part] = ()) -> list[Part]:
    """Of ``wanted``, in this order, those whose limits the budget can hold, and what they need beside what ``ran``."""
    fit: list[Part] = []
    for part in wanted:
        more = [p for p in (*(PARTS[name] for name in part.needs), part) if p not in (*fit, *ran)]
        if sum(p.seconds for p in fit + more) <= budget:
            fit += more
    return fit


class Suite:
    """One call: ``out`` holds rows, logs and states; ``keep`` gets the archive."""

    def __init__(self, out: Path, keep: Path, budget: float = BUDGET_S) -> None:
        self.out, self.keep = out, keep
        self.ends = time.time() + budget
        out.mkdir(parents=True, exist_ok=True)
        keep.mkdir(parents=True, exist_ok=True)

    def take_over(self, archive: Path) -> None:
        """What an earlier call measured, unless this folder has rows: those may be of a later call on this machine."""
        if self.states():
            return
        with tarfile.open(archive) as tar:
            tar.extractall(self.out, filter="data")

    def states(self) -> dict[str, str]:
        """Part -> how its last run ended."""
        path = self.out / "status.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.split(": ", 1) for line in lines)

    def set_state(self, part: str, state: str) -> None:
        states = self.states() | {part: state}
        (self.out / "status.txt").write_text("".join(f"{k}: {v}\n" for k, v in states.items()))
        print(f"{part}: {state}", flush=True)

    def chosen(self, budget: float, ran: Sequence[Part] = ()) -> list[Part]:
        """What no call has finished: first what has no result yet, then what failed and may fail again; not what
        ``ran`` in this call."""
        states = self.states()
        left = [p for p in MEASURED if p not in ran and not states.get(p.name, "").startswith("done")]
        left.sort(key=lambda p: states.get(p.name, "").startswith("failed"))
        return that_fit(left, budget, ran)

    def run(self, parts: list[Part], go_on: bool = False) -> bool:
        """Whether every part was run to its end without a failure. ``go_on``: with what fits into the time that parts
        have left of their limits; another call would build and compile again."""
        ok, ran = True, list[Part]()
        while parts:
            for part in parts:
                left = self.ends - time.time()
                if left < 10:
                    self.set_state(part.name, "not run, the time was up")
                    ok = False
                else:
                    ok &= self.run_part(part, min(part.seconds, left))
                self.archive()
            ran += parts
            parts = self.chosen(self.ends - time.time() - TABLE_S, ran) if go_on else []
        self.tabulate()
        return ok

    def run_part(self, part: Part, seconds: float) -> bool:
        start = time.time()
        for path in self.out.glob(f"{part.name}*.jsonl"):
            if path.name.split(".")[0] == part.name:
                forget_failures(path)
        env = os.environ | {"GPU_SUITE_OUT": str(self.out), "GPU_SUITE_PART_ENDS": str(start + seconds)}
        running = [self.process(part, i, env) for i in range(part.processes)]
        restarts = 0
        codes: dict[int, int | None] = {}
        while len(codes) < len(running):
            for i, process in enumerate(running):
                code = process.poll()
                if i in codes or code is None:
                    continue
                if code == RESTART and restarts < MOST_RESTARTS:
                    restarts += 1
                    running[i] = self.process(part, i, env)
                else:
                    codes[i] = code
            if time.time() > start + seconds:
                for i, process in enumerate(running):
                    if i not in codes:
                        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: with all it started
                        process.wait()
                        codes[i] = None
            time.sleep(0.05)
        took = f"in {time.time() - start:.0f} s" + (f", {restarts} restarts" if restarts else "")
        if all(code == 0 for code in codes.values()) and not restarts:
            self.set_state(part.name, f"done {took}")
            return True
        late = any(code is None for code in codes.values())
        self.set_state(part.name, f"{'stopped at its limit' if late else 'failed'} {took}")
        self.show_log(part)
        return False

    def process(self, part: Part, index: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
        mine = dict(env)
        if part.processes > 1:
            mine |= {"GPU_SUITE_SHARD": f"{index}/{part.processes}", "OMP_NUM_THREADS": "1"}
        log = self.log(part, index).open("ab")
        with log:
            return subprocess.Popen(
                part.command, cwd=ROOT, env=mine, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def log(self, part: Part, index: int) -> Path:
        return self.out / (f"{part.name}.{index}.log" if part.processes > 1 else f"{part.name}.log")

    def show_log(self, part: Part) -> None:
        for index in range(part.processes):
            text = self.log(part, index).read_text(errors="replace").splitlines()[-12:]
            print(*text, sep="\n", flush=True)

    def tabulate(self) -> None:
        """The table of everything so far. Once a call: it takes seconds, in which the GPU has nothing to do."""
        report = [sys.executable, str(HERE / "report.py"), str(self.out / "gpu.md")]
        env = os.environ | {"GPU_SUITE_OUT": str(self.out)}
        done = subprocess.run(report, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], flush=True)
        self.archive()
        if (self.out / "gpu.md").exists():
            shutil.copyfile(self.out / "gpu.md", self.keep / "gpu.md.part")
            (self.keep / "gpu.md.part").replace(self.keep / "gpu.md")

    def archive(self) -> None:
        """Everything so far, where the caller's machine finds it."""
        for log in self.out.glob("*.log"):
            text = log.read_bytes()
            if len(text) > LOG_BYTES:
                log.write_bytes(text[-LOG_BYTES:])
        new = self.keep / "gpu_suite.tgz.part"
        with tarfile.open(new, "w:gz") as tar:
            for path in sorted(self.out.iterdir()):
                if path.suffix in (".jsonl", ".log", ".txt", ".md"):
                    tar.add(path, path.name)
        new.replace(self.keep / "gpu_suite.tgz")


def forget_failures(path: Path) -> None:
    """Rows without a result are made again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    good = [line for line in lines if not failed(json.loads(line))]
    path.write_text("".join(line + "\n" for line in good), encoding="utf-8")


def failed(row: dict[str, object]) -> bool:
    """As `common.bad`, without torch."""
    return row.get("ok") is False or isinstance(row.get("error"), str)


def main() -> int:
    out = Path(os.environ.get("GPU_SUITE_OUT") or ROOT / "build" / "gpu_suite").resolve()
    keep = Path(os.environ.get("GPU_SUITE_KEEP") or ROOT / "benchmarks" / "results").resolve()
    budget = float(os.environ.get("GPU_SUITE_SECONDS") or BUDGET_S)
    suite = Suite(out, keep, budget)
    if os.environ.get("GPU_SUITE_FROM"):
        suite.take_over(Path(os.environ["GPU_SUITE_FROM"]))
    names = os.environ.get("GPU_SUITE_PARTS", "").split()
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        print(
            f"GPU_SUITE_PARTS names {', '.join(unknown)}: the parts are {', '.join(PARTS)}", file=sys.stderr
        )
        return 2
    parts = [PARTS[name] for name in names] if names else suite.chosen(budget)
    if not parts:
        print("every part is done; GPU_SUITE_PARTS runs chosen ones again")
    return 0 if suite.run(parts, go_on=not names) else 1


if __name__ == "__main__":
    sys.exit(main())
