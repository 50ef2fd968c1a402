"""A server with OpenAI's interface on this machine, with a small model behind it, and ways to misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class Served:
    """What the server is, and what was asked of it.

    Attributes:
        kind: "vllm", "sglang" (token ids by request, in SGLang's chats under another name), "tokens" (only
            ``return_tokens_as_token_ids``), "plain" (OpenAI's own keys alone: others are refused, no token ids), "bare"
            (as plain, one choice a request, no log-probs), "llama.cpp" (ids beside the log-probs, at most two choices a
            request) or "ollama" (chats alone, one choice a request, no ids; keys that it does not know are ignored).
        processed: log-probs are those after the temperature.
        failures: statuses that the next requests get; 0 closes the connection, -1 sleeps.
        thoughts: what a chat's message holds apart from its text.
        dies_after: so many answers, and then nothing but closed connections; None: never.
        requests: bodies of all requests for responses.
    """

    model: Any
    tokenizer: Any
    kind: str = "vllm"
    processed: bool = False
    thoughts: str = ""
    names: tuple[str, ...] = ("tiny",)
    failures: list[int] = field(default_factory=list)
    dies_after: int | None = None
    key: str | None = None
    shift: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A completion, by sampling a token at a time."""
        known = {"model", "prompt", "messages", "n", "temperature", "top_p", "max_tokens", "seed", "logprobs"}
        if self.kind in ("plain", "bare") and (more := sorted(body.keys() - known)):
            raise Refused(f"Unrecognized request argument supplied: {more[0]}")
        if self.kind == "tokens" and "return_token_ids" in body:
            raise Refused("extra fields not permitted: return_token_ids")
        chat = path.endswith("chat/completions")
        if self.kind == "llama.cpp" and body["n"] > 2:
            raise Refused(f"Field 'n': Value must be between 1 <= value <= 2, but got {body['n']}")
        if self.kind == "ollama" and not chat:
            raise Refused(
                "json: cannot unmarshal array into Go struct field CompletionRequest.prompt of type string"
            )
        if chat:
            ids = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=True,
                **(body.get("chat_template_kwargs") or {}),
            )["input_ids"]  # fmt: skip
        else:
            ids = body["prompt"]
        ids = [7] * self.shift + list(ids)
        n = 1 if self.kind in ("bare", "ollama") else body["n"]
        choices = [self._choice(k, ids, body, chat) for k in range(n)]
        made: dict[str, Any] = {"choices": choices, "usage": {"prompt_tokens": len(ids)}}
        if self.kind in ("vllm", "sglang") and body.get("return_token_ids"):
            for choice in choices:
                choice["prompt_token_ids"] = ids
        return made

    def _choice(self, k: int, ids: list[int], body: dict[str, Any], chat: bool) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"] * 31 + k)
        tokens, values = list(ids), []
        for _ in range(body["max_tokens"]):
            with torch.no_grad(), self.lock:
                logits = self.model(torch.tensor([tokens])).logits[0, -1].double()
            if body.get("top_k", -1) > 0 and self.kind != "ollama":
                logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
            p = (logits / body["temperature"]).softmax(0)
            token = int(torch.multinomial(p, 1, generator=generator))
            values.append(float((p if self.processed else logits.softmax(0))[token].log()))
            tokens.append(token)
            if token == 1:
                break
        new = tokens[len(ids) :]
        named = self.kind in ("vllm", "tokens") and body.get("return_tokens_as_token_ids")
        words = [f"token_id:{t}" if named else self.tokenizer.decode([t]) for t in new]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        made: dict[str, Any] = {"index": k, "finish_reason": "stop" if new[-1] == 1 else "length"}
        if chat:
            made["message"] = {"role": "assistant", "content": text}
            made["logprobs"] = {"content": [{"token": w, "logprob": v} for w, v in zip(words, values)]}
            if self.thoughts:
                made["message"]["reasoning_content"] = self.thoughts
        else:
            made |= {"text": text, "logprobs": {"tokens": words, "token_logprobs": values}}
        if self.kind == "llama.cpp":  # in both interfaces, and the end token without a text
            entries = [
                {"id": t, "token": "" if t == 1 else w, "logprob": v} for t, w, v in zip(new, words, values)
            ]
            made["logprobs"] = {"content": entries}
        if self.kind in ("bare", "ollama"):
            made["logprobs"] = None
        if self.kind in ("vllm", "sglang") and body.get("return_token_ids"):
            made["response_token_ids" if self.kind == "sglang" and chat else "token_ids"] = new
        return made


class Refused(Exception):
    """Status 400."""


@contextmanager
def serve(model: Any, tokenizer: Any, **options: Any) -> Iterator[Served]:
    """The server, as long as the block lasts."""
    held = Served(model, tokenizer, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in held.names]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with held.lock:
                fault = held.failures.pop(0) if held.failures else None
                dead = held.dies_after is not None and len(held.requests) >= held.dies_after
                if fault is None and not dead:
                    held.requests.append(body)
            if fault == 0 or dead:
                self.close_connection = True
                self.connection.close()
            elif fault == -1:
                threading.Event().wait(1.0)
            elif fault is not None:
                self._send(fault, {"error": {"message": "not now"}})
            elif held.key and self.headers.get("Authorization") != f"Bearer {held.key}":
                self._send(401, {"error": {"message": "wrong key"}})
            else:
                try:
                    self._send(200, held.answer(self.path, body))
                except Refused as error:
                    self._send(400, {"error": {"message": str(error)}})

        def _send(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # who asked has gone
                pass

        def log_message(self, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    held.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
