"""vLLM in this process. **Never run**: what is used of it is tested against a stand-in of its public classes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cropi.errors import CropiError, optional
from cropi.files import is_folder
from cropi.gradient.tokenize import Tokenize
from cropi.model.fingerprint import checkpoint_fingerprint
from cropi.rollouts.engine import Request, Response, is_cut
from cropi.rollouts.file import MODEL
from cropi.rollouts.options import Sampling

BATCH = 256  # prompts that are handed over at once; vLLM schedules their responses itself


class VllmEngine:
    """Samples with ``vllm.LLM``; log-probs are those at the sampling temperature (``processed_logprobs``).

    Args:
        model: a name or folder that vLLM takes.
        sampling, tokens: as for the other engines.
        dtype: of the weights.
        trust_remote_code: let the model bring code of its own, which is run.
        options: further arguments of ``vllm.LLM``.

    Raises:
        CropiError: ``top_k`` or ``top_p`` with a temperature other than 1: vLLM gives log-probs before the temperature
            or after the truncation, and neither are those that are needed.
        ModuleNotFoundError: vLLM is not installed.
    """

    name = "vllm"
    stepped: Callable[[int], None] | None = None

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        tokens: Tokenize,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if sampling.truncates and sampling.temperature != 1.0:
            raise CropiError(
                f"engine vllm: top_k or top_p at temperature {sampling.temperature:g}: vLLM gives log-probs of "
                "temperature 1, or of what the truncation leaves, and neither are those that are needed; use "
                "temperature 1, leave the truncation out, or use --engine hf"
            )
        self.model, self.sampling, self.tokens = model, sampling, tokens
        self._vllm = optional("vllm")
        mode = "raw_logprobs" if sampling.truncates else "processed_logprobs"
        self._options = {
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "logprobs_mode": mode,
            **options,
        }
        self._llm: Any = None

    def describe(self) -> str:
        """vLLM's version."""
        return f"vLLM {getattr(self._vllm, '__version__', 'of unknown version')}"

    def identity(self) -> dict[str, Any]:
        """The model's name, since its weights are in vLLM's hands, and a hash of its folder's files."""
        made: dict[str, Any] = {"model": self.model}
        if is_folder(folder := Path(self.model)):
            made[MODEL] = {"files": checkpoint_fingerprint(folder)}
        return made

    def notes(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def prepare(self, requests: Sequence[Request], notes: dict[str, Any]) -> None:
        """Load the model."""
        longest = max(len(request.prompt) for request in requests) + self.sampling.max_tokens
        self._llm = self._vllm.LLM(
            model=self.model, seed=self.sampling.seed, max_model_len=longest, **self._options
        )

    def plan(self, requests: Sequence[Request], n: int) -> Iterator[list[Request]]:
        """Some prompts at a time, so that finished ones are stored."""
        for start in range(0, len(requests), BATCH):
            yield list(requests[start : start + BATCH])

    def sample(
        self, batch: Sequence[Request], n: int, done: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[Request, list[Response]]]:
        """The responses to the prompts that are not done.

        Raises:
            CropiError: vLLM gives a number of responses or log-probs that was not asked for.
        """
        todo = [request for request in batch if not done(request.name)]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in todo]
        outputs = self._llm.generate(prompts, [self._params(request, n) for request in todo], use_tqdm=False)
        for request, output in zip(todo, outputs, strict=True):
            if len(output.outputs) != n:
                raise CropiError(f"vLLM gave {len(output.outputs)} of {n} responses to {request.name!r:.100}")
            read = list(output.prompt_token_ids or request.prompt)
            if read != list(request.prompt):
                raise CropiError(
                    f"vLLM read the prompt {request.name!r:.100} as other tokens than it was given"
                )
            yield request, [self._response(request, one) for one in output.outputs]

    def _params(self, request: Request, n: int) -> Any:
        s = self.sampling
        return self._vllm.SamplingParams(
            n=n, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k or -1, max_tokens=s.max_tokens, logprobs=0,
            seed=zlib.crc32(f"{s.seed}/{request.name}".encode()) & 0x7FFFFFFF,
            stop_token_ids=sorted(self.tokens.all_ends), skip_special_tokens=True,
        )  # fmt: skip

    def _response(self, request: Request, one: Any) -> Response:
        ids = [int(token) for token in one.token_ids]
        if one.logprobs is None or len(one.logprobs) != len(ids):
            raise CropiError(f"vLLM gave no log-prob for every token of a response to {request.name!r:.100}")
        values = [float(entry[token].logprob) for token, entry in zip(ids, one.logprobs)]
        return Response(ids, values, is_cut(one.finish_reason, f"vLLM: a response to {request.name!r:.100}"))
