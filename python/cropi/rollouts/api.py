"""``cropi.rollout``: prompts and a reward function in, trajectory records out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cropi.checked import check_fields
from cropi.errors import CropiError, RecordError, as_keywords, optional
from cropi.files import path_of
from cropi.gradient.template import prints_date
from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy
from cropi.option_fields import keywords_of, names_of, split
from cropi.options import Loading
from cropi.rollouts.engine import Engine
from cropi.rollouts.file import hash_of
from cropi.rollouts.hf import HfEngine
from cropi.rollouts.http import Server
from cropi.rollouts.job import Job, RolloutReport, run, warn_sampling
from cropi.rollouts.options import Rollout
from cropi.rollouts.prompts import Prompt, read_prompts
from cropi.rollouts.rewards import Reward
from cropi.rollouts.server import ServerEngine
from cropi.rollouts.vllm import VllmEngine

# How messages name the options.
KEYWORDS = keywords_of(Loading, Rollout, more=("out", "reward"))
CLOSELY = 256  # answers that a verifier parses beforehand, which takes milliseconds each


@as_keywords(KEYWORDS)
def rollout(
    model: Any,
    prompts: Any,
    reward: str | Callable[..., Any],
    out: str | Path,
    tokenizer: Any = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> RolloutReport:
    """Sample responses to prompts, score them, and write trajectory records with token ids and log-probs.

    Called again after an interruption, it goes on where it stopped. Called again after it has finished, it samples only
    prompts that are new.

    Args:
        model: the policy: a name or folder, a module (with ``tokenizer``), or a :class:`cropi.Policy`. With the engine
            openai-url only its tokenizer and chat template are used; they must be those of the served model.
        prompts: rows with ``prompt`` (text or messages), ``answer`` and other fields, in any form that
            :func:`cropi.score` takes as ``train``. Of trajectory records only the prompts are used.
        reward: ``"math"``, ``"exact"``, ``"FILE.py:function"``, ``"package.module:function"``, or a function of
            ``(prompt, response, **row)``, or of ``(prompts, completions, **columns)`` as TRL's.
        out: the ``.jsonl`` file.
        tokenizer: the tokenizer of ``model`` where that is a module.
        progress: show progress, as :func:`cropi.score` does.
        say: a function that is called with each line of progress; None prints the lines where ``progress`` is True.
        options: the fields of :class:`cropi.rollouts.options.Rollout`, such as ``n=8``, ``temperature=1.0``; for a
            model by its name, those of :class:`cropi.options.Loading`.

    Returns:
        What was done.

    Raises:
        CropiError: a bad option, prompt, reward or server, or a file that was made with other settings.

    >>> import tempfile, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> prompts = [{"id": "a", "prompt": "-", "prompt_ids": [5, 7]}, {"id": "b", "prompt": "-", "prompt_ids": [8]}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = rollout(model, prompts, lambda prompt, response: 0.0, folder + "/out.jsonl", n=4, max_tokens=6,
    ...         progress=False)
    >>> report.prompts, report.responses
    (2, 8)
    """
    path = path_of(out, "out", "a file that ends in .jsonl")
    loading = {name: options.pop(name) for name in names_of(Loading) if name in options}
    split(loading, Loading)
    (given,) = split(options, Rollout, also=names_of(Loading), by=rollout)
    check_loading(given, loading)
    job = make_job(Policy.of(model, tokenizer, **loading), prompts, reward, given)
    return run(job, path, say=say or (print if progress else _silent), progress=progress)


def make_job(policy: Policy, prompts: Any, reward: str | Callable[..., Any], given: Rollout) -> Job:
    """Check everything that can be checked before the model is loaded, and put the job together."""
    check_fields(given)
    _check_unused(given)
    scorer = Reward(reward)
    tokens = Tokenize(
        policy.tokenizer, policy.vocabulary, policy.context, chat_template=given.chat_template, ends=policy.ends,
        template_date=given.template_date, eos=policy.tokenizer is not None,
    )  # fmt: skip
    if not tokens.all_ends and policy.tokenizer is not None:
        raise CropiError(
            "the model names no token that ends a response; set eos_token_id in its generation_config"
        )
    kept, bad = read_prompts(prompts, tokens, given, room=given.max_tokens)
    kept = _scorable(kept, scorer, bad, given.skip_bad)
    warn_sampling(given)
    engine = _engine(policy, given, tokens)
    identity = engine.identity()
    settings = _settings(policy, given, tokens, scorer) | {"engine": engine.name, **identity}
    name = policy.name if engine.name != "openai-url" else str(identity["served_model"])
    notes = {
        key: value for key, value in (("top_k", given.top_k), ("top_p", given.top_p)) if value not in (0, 1.0)
    }
    policy_name = f"{name} {identity.get('weights', '')}".strip()
    return Job(kept, engine, given, scorer, tokens, settings, policy_name, notes, bad)


def _scorable(prompts: list[Prompt], scorer: Reward, bad: list[RecordError], skip_bad: bool) -> list[Prompt]:
    """The prompts that have what the reward function needs; the others are errors."""
    kept = []
    for number, prompt in enumerate(prompts):
        try:
            scorer.check(prompt, closely=number < CLOSELY)
        except RecordError as error:
            if not skip_bad:
                raise
            bad.append(error)
        else:
            kept.append(prompt)
    if not kept:
        raise CropiError(f"no prompt is left: all are bad; the first: {bad[0].of_left_out}")
    return kept


def _engine(policy: Policy, given: Rollout, tokens: Tokenize) -> Engine:
    if given.engine == "hf":
        return HfEngine(policy, tokens, given, given.rows)
    if given.engine == "vllm":
        if policy.source is None:
            raise CropiError(
                "engine vllm loads the model by its name: give its folder or hub id, not a module"
            )
        return VllmEngine(policy.source, given, tokens, **_for_vllm(policy.loading))
    assert given.url is not None
    server = Server(given.url, os.environ.get(given.api_key), given.timeout, given.retries)
    return ServerEngine(server, given, tokens)


def _for_vllm(loading: dict[str, Any]) -> dict[str, Any]:
    """The options of loading that vLLM has too."""
    default, taken = Loading(), ("dtype", "trust_remote_code", "revision")
    for name, value in loading.items():
        if name not in taken and value != getattr(default, name):
            raise CropiError(f"{name}={value!r}: not for --engine vllm; leave it out, or use --engine hf")
    chosen = {name: loading.get(name, getattr(default, name)) for name in taken}
    return {name: value for name, value in chosen.items() if value is not None}


def _check_unused(given: Rollout) -> None:
    """An option of another engine is not ignored."""
    default = Rollout()
    server = (
        "url", "served_model", "api", "server_logprobs", "concurrency", "timeout", "retries", "api_key"
    )  # fmt: skip
    of = {"openai-url": server, "hf": ("rows",)}
    for engine, names in of.items():
        for name in names if engine != given.engine else ():
            if getattr(given, name) != getattr(default, name):
                flag = name.replace("_", "-")
                raise CropiError(
                    f"{name} is for --engine {engine}, and the engine is {given.engine!r}; leave --{flag} out"
                )
    if given.engine == "openai-url" and given.url is None:
        raise CropiError("engine openai-url needs the server's --url, such as http://localhost:8000/v1")


def check_loading(given: Rollout, loading: Mapping[str, Any]) -> None:
    """Check that nothing is said of how weights are loaded where a server has them, and the tokenizer alone is read.

    Raises:
        CropiError: names the option.
    """
    if given.engine != "openai-url":
        return
    default = Loading()
    for name in ("dtype", "device", "quantize", "attn_implementation"):
        if (value := loading.get(name, getattr(default, name))) != getattr(default, name):
            raise CropiError(
                f"{name} {value!r} says how weights are loaded, and with --engine openai-url the server has them; "
                f"leave --{name.replace('_', '-')} out"
            )


def _settings(policy: Policy, given: Rollout, tokens: Tokenize, scorer: Reward) -> dict[str, Any]:
    names = ("n", "temperature", "top_k", "top_p", "max_tokens", "seed", "system", "columns", "rows")
    settings = {name: getattr(given, name) for name in names}
    if given.engine == "openai-url":
        settings |= {"api": given.api, "server_logprobs": given.server_logprobs}
    tokenizer = policy.tokenizer
    if tokenizer is not None:
        settings |= {
            "tokenizer": policy.tokenizer_fingerprint,
            "chat_template": hash_of({"": tokens.chat_template}),
        }
        if tokens.template is not None and prints_date(tokenizer, tokens.chat_template):
            settings["template_date"] = str(tokens.template.date)
    return settings | {"reward": scorer.name, "max_length": tokens.context, "ends": sorted(tokens.all_ends)}


def _silent(text: str) -> None:
    return None


def check_packages(engine: str) -> None:
    """Check that the packages of an engine are there, before anything is read.

    Raises:
        ModuleNotFoundError: names the pip command.
    """
    for package in ("tqdm", "transformers", "xxhash", *(["vllm"] if engine == "vllm" else [])):
        optional(package)
