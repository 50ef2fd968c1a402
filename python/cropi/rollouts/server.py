"""Any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, TGI, a provider's.

Prompts go as token ids (``completions``) or as messages (``chat``). Where the server gives token ids (vLLM's
``return_token_ids`` or ``return_tokens_as_token_ids``, asked for once; llama.cpp's ``id`` beside each log-prob),
records hold them; else they hold text alone, and a message says so. What the server reads as the prompt is compared by
its count of tokens.
"""

from __future__ import annotations

import queue
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cropi.data.chat import as_messages
from cropi.errors import CropiError, shown, warn
from cropi.gradient.tokenize import Tokenize
from cropi.rollouts.engine import Request, Response, is_cut
from cropi.rollouts.http import Server, ServerError
from cropi.rollouts.options import Rollout, Sampling

TOKEN = re.compile(r"token_id:(\d+)")
# What is asked of servers that know it; the first set that the server takes is used. Servers take what is not given
# from the model's generation_config (vLLM) or from defaults of their own (llama.cpp), which truncate and penalise.
_PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": True}
EXTRAS: tuple[dict[str, Any], ...] = (
    {"return_token_ids": True, "return_tokens_as_token_ids": True, "top_k": -1, **_PLAIN},
    {"return_tokens_as_token_ids": True, "top_k": -1, **_PLAIN},
    {"top_k": -1, **_PLAIN},
    {},
)
REFUSALS = (400, 404, 405, 415, 422)
# What a chat's message holds apart from its text where the server takes a response's thoughts out of it.
THOUGHTS = ("reasoning_content", "reasoning")
OWN_DEFAULTS = "make sure that its own defaults neither truncate nor penalise"


class ServerNote(UserWarning):
    """What a server does not give."""


class ServerEngine:
    """Samples by requests, several at a time; a prompt is finished when all its responses are there.

    Args:
        server: where.
        options: how responses are drawn, and what of the server is used.
        tokens: its tokenizer is the served model's; which tokens end a response.
    """

    name = "openai-url"
    stepped: Callable[[int], None] | None = None

    def __init__(self, server: Server, options: Rollout, tokens: Tokenize) -> None:
        self.server, self.sampling, self.tokens = server, options, tokens
        self.api, self.model, self.concurrency = options.api, options.served_model, options.concurrency
        self.extras: dict[str, Any] = {}
        self.at_once: int | None = None  # responses a request, at most; None: as many as are wanted
        self.unrecorded = unrecorded(options.server_logprobs, options)
        self._said: set[str] = set()

    def describe(self) -> str:
        """URL, model, and whether log-probs are recorded."""
        what = f"not recorded: {self.unrecorded}" if self.unrecorded else "recorded where it gives token ids"
        return f"{self.model} at {self.server.url}, {self.concurrency} requests at a time, log-probs {what}"

    def identity(self) -> dict[str, Any]:
        """The served model's name: nothing else is known of it."""
        return {"served_model": self._served()}

    def notes(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def prepare(self, requests: Sequence[Request], notes: dict[str, Any]) -> None:
        """Find out which of the further keys the server takes, and whether it heeds them, by short requests.

        Raises:
            ServerError: it does not answer, or refuses the plain request too.
            CropiError: it takes a top_k that was asked for, and draws from all tokens.
        """
        self._served()
        for extras in EXTRAS:
            self.extras = extras
            try:
                self._ask(requests[0], 1, 0, max_tokens=1)
                break
            except ServerError as error:
                if error.status not in REFUSALS:
                    raise
                if extras is EXTRAS[-1]:
                    ids = "" if self.api == "chat" else "; if it takes no token ids, use --api chat"
                    raise ServerError(f"{error}{ids}", error.status) from error
        if not self.extras:
            self._say("plain", f"takes no top_k, min_p and repetition_penalty: {OWN_DEFAULTS}")
        elif not self._heeds(requests[0]):
            if self.sampling.top_k:
                raise CropiError(
                    f"top_k: the server at {self.server.url} ignores it; leave --top-k out, or use another server"
                )
            self._say("plain", f"ignores top_k, and so maybe min_p and repetition_penalty: {OWN_DEFAULTS}")

    def _heeds(self, request: Request) -> bool:
        """Whether the most probable tokens alone are drawn where ``top_k`` is 1, however warm; some servers (Ollama)
        take keys that they do not know.
        """
        sharp = {"max_tokens": 4, "top_k": 1, "temperature": 2.0, "top_p": 1.0}
        seen: list[list[tuple[list[int], str | None]]] = []
        try:
            # Of two tokens of nearly one probability, a cached prompt may give the other.
            for before in range(3):
                made = [(one.ids, one.text) for one in self._ask(request, 1, before, **sharp)[:1]]
                if made in seen:
                    return True
                seen.append(made)
        except ServerError as error:  # of a provider that allows no such temperature
            if error.status not in REFUSALS:
                raise
            return True
        return False

    def plan(self, requests: Sequence[Request], n: int) -> Iterator[list[Request]]:
        """All prompts at once: each is sampled by itself."""
        yield list(requests)

    def sample(
        self, batch: Sequence[Request], n: int, done: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[Request, list[Response]]]:
        """The responses to each prompt that is not done, in the order in which the server finishes them.

        Raises:
            ServerError: it does not answer any more, or not with what was asked for.
        """
        todo = (request for request in batch if not done(request.name))
        asked: queue.Queue[Request | None] = queue.Queue()
        answers: queue.Queue[tuple[Request, list[Response] | BaseException]] = queue.Queue()

        def work() -> None:
            while (request := asked.get()) is not None and not self.server.stop.is_set():
                try:
                    answers.put((request, self._all(request, n)))
                except BaseException as error:
                    answers.put((request, error))

        self.server.stop.clear()
        # Not an executor's threads: Python waits for those at its end, for as long as a server takes.
        for _ in range(self.concurrency):
            threading.Thread(target=work, name="cropi-rollout", daemon=True).start()
        waiting = 0
        try:
            while True:
                while waiting < 2 * self.concurrency and (request := next(todo, None)) is not None:
                    asked.put(request)
                    waiting += 1
                if not waiting:
                    return
                request, made = answers.get()
                waiting -= 1
                if isinstance(made, BaseException):
                    raise made
                yield request, made
        finally:
            self.server.stop.set()
            for _ in range(self.concurrency):
                asked.put(None)

    # --------------------------------------------------------------------------------------------- inside
    def _served(self) -> str:
        if self.model is None:
            held = self.server.get("models")
            names = (
                [m.get("id") for m in held.get("data", ()) if isinstance(m, dict)]
                if isinstance(held, dict)
                else []
            )
            if len(names) != 1:
                raise CropiError(
                    f"served_model: the server at {self.server.url} has {len(names)} models "
                    f"({', '.join(map(str, names[:20])) or 'none named'}); name one with --served-model"
                )
            self.model = str(names[0])
        return self.model

    def _all(self, request: Request, n: int) -> list[Response]:
        made: list[Response] = []
        while len(made) < n:  # some servers give one response a request, whatever is asked for
            wanted = min(n - len(made), self.at_once or n)
            try:
                new = self._ask(request, wanted, len(made))
            except ServerError as error:
                if wanted == 1 or error.status not in REFUSALS:
                    raise
                # llama.cpp refuses more than it has slots for.
                self.at_once = 1
                continue
            if not new:
                raise ServerError(
                    f"the server at {self.server.url} gave no response to {request.name!r:.100}"
                )
            made += new
        return made[:n]

    def _ask(self, request: Request, n: int, before: int, **changes: Any) -> list[Response]:
        seed = zlib.crc32(f"{self.sampling.seed}/{before}/{request.name}".encode()) & 0x7FFFFFFF
        body: dict[str, Any] = {
            "model": self.model, "n": n, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens, "seed": seed, **self.extras,
        }  # fmt: skip
        if self.sampling.top_k:
            body["top_k"] = self.sampling.top_k
        body |= changes
        if self.api == "chat":
            body["messages"] = as_messages(request.messages)
            body |= {"logprobs": True, **request.options}
            path = "chat/completions"
        else:
            body |= {"prompt": list(request.prompt), "logprobs": 1}
            path = "completions"
        return self._read(request, self.server.post(path, body))

    def _read(self, request: Request, answer: Any) -> list[Response]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ServerError(
                f"the server at {self.server.url} answered without 'choices': {shown(answer, 200)}"
            )
        usage = answer.get("usage") or {}
        whole = answer.get("prompt_token_ids") or next((c.get("prompt_token_ids") for c in choices), None)
        self._check_prompt(request, whole, usage.get("prompt_tokens"))
        return [self._response(request, choice) for choice in choices]

    def _check_prompt(self, request: Request, whole: Any, count: Any) -> None:
        size = len(whole) if isinstance(whole, list) else count
        given = list(request.prompt)
        if isinstance(size, int) and size != len(given) or isinstance(whole, list) and whole != given:
            how = "messages" if self.api == "chat" else "token ids"
            raise ServerError(
                f"the server at {self.server.url} read the prompt {request.name!r:.100}, given as {how}, as {size} "
                f"tokens, but the tokenizer and template of --model make {len(given)} of it"
                f"{'' if size != len(given) else ' that are others'}; give the model that is served, or its "
                "--chat-template"
            )

    def _response(self, request: Request, choice: dict[str, Any]) -> Response:
        message, what = choice.get("message") or {}, f"a response to {request.name!r:.100}"
        if message.get("tool_calls"):
            raise ServerError(f"{what} calls a tool, which a rollout of one turn has nobody to answer")
        text = str((message.get("content") if self.api == "chat" else choice.get("text")) or "")
        tokens, values = _tokens(choice)
        ids = _ids(choice, tokens)
        truncated = is_cut(choice.get("finish_reason"), f"the server at {self.server.url}: {what}")
        if ids is None:
            self._say(
                "ids",
                "gives no token ids: records hold text, of which tokens are made again (not always the same)",
            )
            if any(message.get(key) for key in THOUGHTS):
                raise ServerError(
                    f"the server at {self.server.url} takes the thoughts out of the text of {what}, so that no tokens "
                    "can be made of it: have it leave them in (llama.cpp: --reasoning-format none), switch thinking "
                    "off, or use a server that gives token ids"
                )
            return Response([], None, truncated, text)
        if not truncated and ids and ids[-1] not in self.tokens.all_ends:
            self._say(
                "end",
                "leaves the end token out of a response's token ids: its probability is not in the gradient",
            )
        logprobs = self._log_probs(values, len(ids))
        return Response([int(token) for token in ids], logprobs, truncated, None if ids else text)

    def _log_probs(self, values: list[Any] | None, count: int) -> list[float] | None:
        if values is None and not self.unrecorded:
            self._say(
                "logprobs", "gives no log-probs: records hold none, and every ratio will be 1 (--behaviour)"
            )
        if values is None:
            return None
        if len(values) != count or any(not isinstance(v, (int, float)) for v in values):
            raise ServerError(
                f"the server at {self.server.url} gave {len(values)} log-probs for {count} tokens"
            )
        return None if self.unrecorded else [float(value) for value in values]

    def _say(self, kind: str, what: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(f"the server at {self.server.url} {what}", ServerNote)


def _tokens(choice: dict[str, Any]) -> tuple[list[str], list[Any] | None]:
    """The sampled tokens and their log-probs, in either form."""
    held = choice.get("logprobs")
    if not isinstance(held, dict):
        return [], None
    if isinstance(held.get("content"), list):  # chat
        return [str(e.get("token")) for e in held["content"]], [e.get("logprob") for e in held["content"]]
    values = held.get("token_logprobs")
    return [str(token) for token in held.get("tokens") or ()], values if isinstance(values, list) else None


def _ids(choice: dict[str, Any], tokens: Sequence[str]) -> Any:
    """The sampled tokens' ids, in whichever form the server gives them; None where it gives none."""
    for key in ("token_ids", "response_token_ids"):  # the second is of SGLang's chat
        if choice.get(key) is not None:
            return choice[key]
    if tokens and all(TOKEN.fullmatch(token) for token in tokens):
        return [int(token.partition(":")[2]) for token in tokens]
    # llama.cpp writes them beside the log-probs, the end token's too.
    held = choice.get("logprobs")
    entries = held.get("content") if isinstance(held, dict) else None
    ids = [entry.get("id") for entry in entries or ()]
    return ids if ids and all(type(one) is int for one in ids) else None


def unrecorded(logprobs: str, sampling: Sampling) -> str:
    """Why an engine's log-probs are not those that an estimator needs; empty where they are.

    Needed are those of the whole distribution at the temperature of the sampling.
    """
    if logprobs == "none":
        return "--server-logprobs none"
    if logprobs == "raw" and sampling.temperature != 1.0:
        return f"raw ones are of temperature 1, not {sampling.temperature:g}"
    if logprobs == "processed" and sampling.truncates:
        return "processed ones are of what top-k and top-p leave"
    return ""
