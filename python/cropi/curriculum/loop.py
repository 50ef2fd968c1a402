"""The loop over stages: every step once, in order, however often the process dies in between."""

from __future__ import annotations

import time
from collections.abc import Callable

from cropi.atomic import make_folder
from cropi.curriculum import steps
from cropi.curriculum.checks import check_plan
from cropi.curriculum.data import Files
from cropi.curriculum.plan import Plan
from cropi.curriculum.report import line, write_report
from cropi.curriculum.state import State
from cropi.files import writing
from cropi.locks import locked_folder

LOG = "log.txt"
WORK: dict[str, Callable[[steps.Stage], steps.Result]] = {
    "rollouts": steps.rollouts,
    "sketch": steps.sketch_all,
    "influence": steps.influence_all,
    "select": steps.select_best,
    "train": steps.train,
    "collect": steps.collect,
}


def run(plan: Plan, say: Callable[[str], None] = print) -> State:
    """Do every step of every stage that is not finished yet.

    ::

        for m in 0 .. stages-1:
            sketch      g(s) of every training and validation prompt under the current policy pi_m
            influence   score[s, v] = cos(g(s), mean of v)
            select      D_m = the best fraction of the prompts
            train       pi_m -> pi_{m+1} on D_m alone, for ``steps`` steps
            collect     pi_{m+1}, and the rollouts of the training if it kept them

    Trajectories are those of the first policy throughout, reweighted by the ratio pi_m / pi_0 (arXiv 2510.26491),
    unless the plan renews them. A step is finished when ``state.json`` says so; sketching goes on inside its step
    at the first prompt that is missing, and the trainer's command is run again with the same ``{out}``.

    Args:
        plan: what to do.
        say: takes every line of the log as well.

    Raises:
        CropiError: bad input, a failed command, or a folder that was begun with other settings.
        KeyboardInterrupt: after Ctrl-C; what was finished is kept.
    """
    files = Files(plan, say)
    check_plan(plan, files)
    with locked_folder(plan.out, "cropi curriculum") as lock:
        state = State.open(plan)
        log = plan.out / LOG

        def note(text: str) -> None:
            say(text)
            with writing(log), open(log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

        note(
            f"curriculum    {plan.out}: {plan.stages} stages of {plan.steps} steps, settings {plan.fingerprint()}"
        )
        if state.data["started"]:
            left = state.data["started"]
            note(f"resumed       in stage {left['stage']}, step {left['step']!r}, which was cut short")
        model = plan.model
        for number in range(plan.stages):
            stage = steps.Stage(plan, files, state, number, model, lock)
            with writing(stage.folder):
                make_folder(stage.folder)
            for name, work in WORK.items():
                if name == "rollouts" and not (
                    plan.rollouts and (number == 0 or plan.rollouts_when == "every")
                ):
                    continue
                if state.result(number, name):
                    continue
                # A command may run for hours, and prints nothing here.
                output = stage.log(name)
                note(f"stage {number}       {name} ...{f' (its output: {output})' if output else ''}")
                result = state.do(number, name, lambda work=work, stage=stage: work(stage))
                note(f"stage {number}       {line(result)}")
                write_report(plan, state)
            finished = state.result(number, "collect")
            assert finished is not None
            model = finished["model"]
        write_report(plan, state)
        note(f"finished      the last policy is {model}; report: {plan.out / 'report.md'}")
    return state
