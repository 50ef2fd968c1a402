"""Traces of verifiers, which prime-rl saves too, as the rows that verifiers saved before it had traces.

A trace is a graph of messages: every node of ``nodes`` names its ``parent`` and holds the tokens that it adds
(``token_ids``), which of them the model sampled (``mask``) and their log-probs (``logprobs``, of the sampled ones
alone). A trace whose nodes are one path is one sequence; one that forks (a subagent, a conversation that was shortened)
is several with one reward. An episode holds the ``traces`` of all agents; those of agents that are not trained are left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from cropi.form import nested
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    finite,
    is_bit,
    listed,
    shown,
    token_ids,
)
from cropi.trainers.dumps.rows import id_of

LIMITS = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed")


def rows_of_traces(
    pairs: Iterator[tuple[str, dict[str, Any]]], left: Left
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pairs ``(file:line, row)``, with rows of the older layout in the place of traces and episodes."""
    for where, row in pairs:
        if "traces" in row:
            traces = row["traces"] if isinstance(row["traces"], list) else [row["traces"]]
            places = [(f"{where}, traces[{i}]", trace) for i, trace in enumerate(traces)]
        elif "nodes" in row:
            places = [(where, row)]
        else:
            yield where, row
            continue
        yield from left.each(places, partial(_converted, row))


def _converted(episode: Mapping[str, Any], pair: tuple[str, Any]) -> tuple[str, dict[str, Any]]:
    where, trace = pair
    return where, _row(trace, episode, where)


def _row(trace: Any, episode: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row of a trace.

    Raises:
        Unused: its agent is not trained, or it ended in an error.
        BadSample: it is not a single path, or its tokens and masks do not fit together.
    """
    if not isinstance(trace, Mapping) or not isinstance(trace.get("nodes"), list):
        raise BadSample(where, "nodes", f"a trace with a list of nodes is expected, got {shown(trace)}")
    if nested(trace, "agent.trainable") is False:
        raise Unused(where, "agent", f"the agent {shown(nested(trace, 'agent.name'))} is not trained")
    if _failed(trace):
        raise Unused(where, "error", "the rollout ended in an error")
    nodes = _path(trace["nodes"], where)
    asked = next((i for i, node in enumerate(nodes) if node.get("sampled")), len(nodes))
    prompt, said = ([_message(node, where) for node in part] for part in (nodes[:asked], nodes[asked:]))
    env = [nested(trace, "info.prime_rl.env_name"), nested(episode, "env.name"), nested(episode, "env.id")]
    task = trace.get("task")
    names = [nested(task, key) for key in ("key", "hash", "data.id", "data.idx", "id", "idx")]
    return {
        **trace, "reward": _reward(trace, where),
        "example_id": next((name for name in names if name is not None), id_of({}, None, prompt, where)),
        "env_id": next((name for name in env if name), None), "at_step": nested(episode, "run.work.step"),
        "prompt": prompt, "completion": said, "answer": nested(task, "data.answer"), "is_truncated": _cut(trace),
        "sampling_args": {"temperature": _temperature(trace, where)}, "trajectory": _turns(nodes, where),
    }  # fmt: skip


def _failed(trace: Mapping[str, Any]) -> bool:
    """Whether the rollout ended in an error; errors of attempts that were repeated do not count."""
    return trace["ok"] is False if "ok" in trace else bool(trace.get("errors"))


def _reward(trace: Mapping[str, Any], where: str) -> float | None:
    """The sum of the named rewards, each times its weight; None where nothing was scored."""
    rewards = trace.get("rewards")
    if not isinstance(rewards, Mapping):
        raise BadSample(where, "rewards", f"should be rewards by name, got {shown(rewards)}")
    total = None
    for name, value in rewards.items():
        if value is not None:
            held = value if isinstance(value, Mapping) else {"score": value}
            score, weight = held.get("score"), held.get("weight", 1.0)
            field = f"rewards[{shown(name)}]"
            total = (total or 0.0) + finite(score, field, where) * finite(weight, field, where)
    return total


def _path(nodes: Sequence[Any], where: str) -> list[Mapping[str, Any]]:
    """The nodes from the root to the only leaf."""
    path: list[Mapping[str, Any]] = []
    for number, node in enumerate(nodes):
        if not isinstance(node, Mapping):
            raise BadSample(where, f"nodes[{number}]", f"should be a message's node, got {shown(node)}")
        if node.get("parent") != (number - 1 if number else None):
            raise BadSample(
                where, f"nodes[{number}]", "begins another branch, so the rollout is several sequences with one reward",
                "save rollouts whose turns only add to the conversation, or pass --skip-bad",
            )  # fmt: skip
        path.append(node)
    return path


def _message(node: Mapping[str, Any], where: str) -> Any:
    """A message as chat templates know it."""
    message = node.get("message")
    if not isinstance(message, Mapping):
        raise BadSample(where, "message", f"should be a message, got {shown(message)}")
    made = {"content": "", **{key: value for key, value in message.items() if value is not None}}
    if isinstance(made.get("tool_calls"), list):
        made["tool_calls"] = [_call(call) for call in made["tool_calls"]]
    return made


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping) or "function" in call:
        return call
    function = {key: call[key] for key in ("name", "arguments") if key in call}
    return {"id": call.get("id"), "type": call.get("type", "function"), "function": function}


def _turns(nodes: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]] | None:
    """All tokens of the path as one turn; None where the nodes hold none.

    Raises:
        BadSample: another number of entries than tokens, or of log-probs than sampled tokens.
    """
    ids: list[int] = []
    mask: list[bool] = []
    probs: list[float] = []
    for number, node in enumerate(nodes):
        name = f"nodes[{number}]"
        here = token_ids(node.get("token_ids") or [], f"{name}.token_ids", where)
        marks = listed(node.get("mask") or [], f"{name}.mask", where)
        if not all(map(is_bit, marks)):
            raise BadSample(where, f"{name}.mask", "should hold truth values")
        values = iter(held := listed(node.get("logprobs") or [], f"{name}.logprobs", where))
        if len(marks) != len(here) or len(held) != sum(marks):
            raise BadSample(
                where, name, f"has {len(here)} tokens, {len(marks)} entries of the mask, {sum(marks)} of them sampled, "
                f"and {len(held)} log-probs",
            )  # fmt: skip
        ids += here
        mask += marks
        probs += [next(values) if mark else 0.0 for mark in marks]
    if not ids:
        return None
    begin = mask.index(True) if any(mask) else len(mask)
    tokens = {
        "prompt_ids": ids[:begin], "completion_ids": ids[begin:], "completion_logprobs": probs[begin:],
        "completion_mask": [int(mark) for mark in mask[begin:]],
    }  # fmt: skip
    return [{"tokens": tokens}]


def _temperature(trace: Mapping[str, Any], where: str) -> Any:
    """The temperature of all calls of the model; None where it is not saved."""
    calls = trace.get("calls")
    temperatures = [nested(call, "sampling.temperature") for call in calls] if isinstance(calls, list) else []
    if any(one != temperatures[0] for one in temperatures):
        several = shown(sorted(set(map(str, temperatures))))
        raise BadSample(
            where, "calls", f"the turns were sampled at the temperatures {several}, but a record has one"
        )
    return temperatures[0] if temperatures else None


def _cut(trace: Mapping[str, Any]) -> bool:
    calls = trace.get("calls")
    last = calls[-1] if isinstance(calls, list) and calls else None
    return trace.get("stop_condition") in LIMITS or nested(last, "finish_reason") == "length"
