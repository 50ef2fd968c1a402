"""Other libraries on the same job on a CPU: ``python -m benchmarks.peers`` (some minutes).

The job: all pairs' products of the gradients of some sequences, of a causal language model's loss with a weight for
every token. A Llama with SmolLM2's widths, four layers and 8192 words, so that libraries that form whole gradients fit
into 4 GiB; float32; the sequences have one length. Each library does it with its own functions and the settings that
its documentation gives for projection; models, hooks and projectors are made before the clock starts.

- the loop: plain autograd, one sequence at a time, whole gradients; what the others' cosines are held to.
- bergson: its collector of linear layers' gradients, 16 x 16 numbers a module.
- dattri-llm: `HookManager` and `Gradient.similarity`, exact products from the layers' factors.
- kronfluence: `compute_pairwise_scores` with the strategy "identity", exact products of linear layers.
- dattri: `AttributionTask`'s gradients by vmap, then `random_project` to 512 numbers.
- TRAK: `FunctionalGradientComputer`, then `BasicProjector` (the one that runs on a CPU) to 2048 numbers.

The projections of the last two draw a matrix of all parameters by all numbers; they are timed at few numbers, to which
their time is proportional, and scaled. LESS is not here: it is not a package (its method is LoRA gradients, Adam's
moments and TRAK's projector). To install the others beside a torch that is there already:

    pip install --no-deps bergson==2.5.1 dattri==0.3.0 dattri-llm==0.1.0 kronfluence==1.0.1 traker==0.3.2
    pip install einconv einops jaxtyping ml_dtypes petname simple-parsing

What is not installed is left out of the table by name; what fails stands there with its error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.timing import Cost, rotated, timed
from benchmarks.lib import memory
from benchmarks.lib.bergson_collector import collector, rows_of
from benchmarks.lib.environment import describe
from benchmarks.lib.script import options, publish
from cropi_kernels import GradientSketcher

TIMED = 4  # numbers at which a dense projection is timed
SHAPES: dict[str, Any] = dict(
    vocab_size=8192, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    max_position_embeddings=2048, tie_word_embeddings=True, attn_implementation="eager",
)  # fmt: skip


class Work:
    """A model of its own, and the sequences: four subjects, each with words of its own, and weights of either sign."""

    def __init__(self, layers: int, sequences: int, length: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPES)).eval()
        subject = torch.arange(sequences)[:, None] % 4
        self.ids = torch.randint(16, (sequences, length)) + 64 * subject
        signs = torch.where(torch.arange(sequences) % 3 == 0, -1.0, 1.0)
        self.weights = signs[:, None] * torch.rand(sequences, length - 1)

    def loss(self, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the tokens' negative log-probs, over all rows."""
        logits = logits[:, :-1]
        logp = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return -(weights * logp).sum()

    def functional(
        self, parameters: Any, buffers: Any, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one sequence as a function of the parameters."""
        held = (parameters, buffers) if buffers is not None else parameters
        out = torch.func.functional_call(self.model, held, (ids[None],), {"use_cache": False})
        return self.loss(ids[None], weights[None], out.logits)

    def linears(self) -> set[str]:
        return {n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}

    def backward(self) -> None:
        self.loss(self.ids, self.weights, self.model(self.ids, use_cache=False).logits).backward()


Job = Callable[[], Any]


def loop(work: Work) -> Job:
    def run() -> torch.Tensor:
        rows = []
        for ids, weights in zip(work.ids, work.weights):
            logits = work.model(ids[None], use_cache=False).logits
            grads = torch.autograd.grad(
                work.loss(ids[None], weights[None], logits), list(work.model.parameters())
            )
            rows.append(torch.cat([g.flatten() for g in grads]))
        held = torch.stack(rows)
        return held @ held.T

    return run


def ours(work: Work) -> Job:
    count, length = work.ids.shape
    grid = torch.arange(count * length).view(count, length)
    positions, targets = grid[:, :-1].reshape(-1), work.ids[:, 1:].reshape(-1)
    flat, sketcher = work.weights.reshape(-1), GradientSketcher(work.model)

    def run() -> torch.Tensor:
        with sketcher:
            rows = sketcher.policy_gradient(
                work.ids, segments=torch.arange(count), positions=positions, targets=targets,
                weigh=lambda logp, start, stop: flat[start:stop],
            ).sketches  # fmt: skip
        return rows @ rows.T

    return run


def bergson(work: Work) -> Job:
    collect = collector(work.model, work.linears())
    for p in work.model.parameters():
        p.requires_grad_(False)

    def run() -> torch.Tensor:
        embedded = work.model.get_input_embeddings()(work.ids).requires_grad_(True)
        with collect() as collected:
            logits = work.model(inputs_embeds=embedded, use_cache=False).logits
            work.loss(work.ids, work.weights, logits).backward()
        rows = rows_of(collected)
        return rows @ rows.T

    return run


def dattri_llm(work: Work) -> Job:
    import dattri_llm as library

    config = library.HookManagerConfig(linear_io=library.REGISTER_ALL)
    manager = library.HookManager(work.model, config=config, callbacks=[])

    def run() -> Any:
        with manager.collect():
            work.backward()
            gradient = manager.get_gradient()
            products = sum(gradient.similarity(gradient).values())
        work.model.zero_grad()
        return products

    return run


def kronfluence(work: Work) -> Job:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Weighted(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            ids, weights = batch
            return work.loss(ids, weights, model(ids, use_cache=False).logits)

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return sorted(work.linears())

    task, data = Weighted(), torch.utils.data.TensorDataset(work.ids, work.weights)
    folder = tempfile.TemporaryDirectory(prefix="peers-")
    model = prepare_model(work.model, task)
    analyzer = Analyzer(
        "peers", model, task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder.name
    )
    size = len(work.ids)
    analyzer.fit_all_factors(
        "f", data, per_device_batch_size=size, factor_args=FactorArguments(strategy="identity")
    )

    def run() -> Any:
        analyzer.compute_pairwise_scores(
            "s", "f", data, data, size, size, score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"]

    run.folder = folder  # type: ignore[attr-defined]
    return run


class Projected:
    """A library that forms whole gradients and then projects them; the projection is timed apart, and scaled."""

    def __init__(self, gradients: Callable[[], Any], project: Callable[[Any], Any], numbers: int) -> None:
        self.gradients, self.project, self.numbers = gradients, project, numbers

    def cost(self) -> Cost:
        held: list[Any] = []
        first = timed(lambda: held.append(self.gradients()))
        second = timed(lambda: self.project(held[0]))
        scale = self.numbers / TIMED
        return Cost(first.seconds + scale * second.seconds, first.processor + scale * second.processor, 0)

    def __call__(self) -> None:
        self.project(self.gradients())


def dattri(work: Work) -> Projected:
    from dattri.func.projection import random_project
    from dattri.task import AttributionTask

    def loss(parameters: Any, data: Any) -> torch.Tensor:
        return work.functional(parameters, None, *data)

    task = AttributionTask(loss, work.model, work.model.state_dict())
    parameters, _ = task.get_param(0)
    gradients = task.get_grad_loss_func(in_dims=(None, 0))
    count = len(work.ids)

    def project(held: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = random_project(held, count, TIMED, 32, device="cpu")(held)
        return made

    return Projected(lambda: gradients(parameters, (work.ids, work.weights)), project, 512)


def trak(work: Work) -> Projected:
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType
    from trak.utils import vectorize

    class Output(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None: ...

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, ids: Any, tokens: Any) -> torch.Tensor:
            return work.functional(weights, buffers, ids, tokens)

        def get_out_to_loss_grad(self, *args: Any) -> None: ...

    size, cpu = sum(p.numel() for p in work.model.parameters()), torch.device("cpu")
    computer = FunctionalGradientComputer(work.model, Output(), size, torch.float32, cpu)
    projector = BasicProjector(size, TIMED, 0, ProjectionType.rademacher, cpu, block_size=TIMED)
    held = torch.empty(len(work.ids), size)

    def gradients() -> torch.Tensor:
        vectorize(computer.compute_per_sample_grad((work.ids, work.weights)), held, device="cpu")
        return held

    return Projected(gradients, lambda held: projector.project(held, model_id=0), 2048)


KINDS: dict[str, tuple[str, str | None, Callable[[Work], Job]]] = {
    "ours": ("cropi-kernels, 32768 numbers of all parameters", None, ours),
    "loop": ("plain autograd, one sequence at a time, exact", None, loop),
    "bergson": ("bergson, 16 x 16 numbers a linear layer", "bergson", bergson),
    "dattri-llm": ("dattri-llm, exact products from factors", "dattri-llm", dattri_llm),
    "kronfluence": ("kronfluence, exact products of linear layers", "kronfluence", kronfluence),
    "dattri": ("dattri, gradients by vmap, 512 numbers (scaled)", "dattri", dattri),
    "trak": ("TRAK, gradients by vmap, 2048 numbers (scaled)", "traker", trak),
}


def made(kind: str, args: argparse.Namespace) -> Job:
    return KINDS[kind][2](Work(args.layers, args.sequences, args.length))


def peak(job: Job) -> int:
    """Bytes resident at the peak of a run after the first."""
    job()
    return memory.peak(job)


def pairs(products: torch.Tensor) -> torch.Tensor:
    """The cosines of all pairs of two."""
    size = products.diagonal().sqrt()
    cosines = (products / size[:, None] / size).double()
    return cosines[tuple(torch.triu_indices(len(size), len(size), 1))]


def agreement(got: Any, exact: torch.Tensor) -> str:
    if not isinstance(got, torch.Tensor):
        return "not measured"
    found = pairs(got.detach().float())
    together = torch.corrcoef(torch.stack([found, exact]))[0, 1]
    return f"{float(together):.4f} | {float((found - exact).abs().mean()):.4f}"


def installed(kind: str) -> str | None:
    """The version of a peer; an empty string for what needs none, None where it is missing."""
    package = KINDS[kind][1]
    try:
        return importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.md"))
    parser.add_argument("--peak", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(made(args.peak, args))))
        return
    jobs, results, failed = {}, {}, {}
    for kind in dict.fromkeys(["ours", "loop", *args.only]):
        if installed(kind) is None:
            failed[kind] = f"not installed: pip install --no-deps {KINDS[kind][1]}"
            continue
        try:
            jobs[kind] = made(kind, args)
            results[kind] = jobs[kind]()  # the warm-up
        except Exception as error:
            jobs.pop(kind, None)
            failed[kind] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    costs: dict[str, list[Cost]] = {kind: [] for kind in jobs}
    for round_ in range(args.rounds):
        for kind in rotated(jobs, round_):
            job = jobs[kind]
            costs[kind].append(job.cost() if isinstance(job, Projected) else timed(job))
    shape = [f"--{name}={getattr(args, name)}" for name in ("layers", "sequences", "length")]
    peaks = {}
    for kind in jobs:
        command = [sys.executable, "-m", "benchmarks.peers", f"--peak={kind}", *shape]
        peaks[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    exact = pairs(results["loop"].float())
    write(args, costs, peaks, {kind: agreement(results[kind], exact) for kind in jobs}, failed)


def write(
    args: argparse.Namespace, costs: Any, peaks: dict[str, int], agree: dict[str, str], failed: dict[str, str]
) -> None:
    lines = []
    for kind, of in costs.items():
        ratios = sorted(a.processor / b.processor for a, b in zip(of, costs["ours"], strict=True))
        seconds = statistics.median(cost.processor for cost in of)
        name, what = KINDS[kind][0].split(", ", 1)
        lines.append(
            f"| {' '.join([name, installed(kind) or '']).strip()}, {what} | {seconds:.2f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {peaks[kind] / 2**20:.0f} | "
            f"{agree[kind] if '|' in agree[kind] else agree[kind] + ' |'} |"
        )  # fmt: skip
    lines += [f"| {KINDS[kind][0]} | did not run: {why} | | | | |" for kind, why in failed.items()]
    shape = f"{args.sequences} sequences of {args.length} tokens"
    head = (
        "library", "processor seconds (median)", "of cropi-kernels (median of pairs, least to most)",
        "peak memory, MiB", "correlation with exact cosines", "mean error of a cosine",
    )  # fmt: skip
    text = f"""# Other libraries on the same job

All pairs' products of the gradients of {shape}, with a weight for every token: a Llama with SmolLM2's widths,
{args.layers} layers and {SHAPES["vocab_size"]} words, float32. The head of `benchmarks/peers.py` says what each runs.
{args.rounds} rounds in turns; {describe()}

| {" | ".join(head)} |
|{" --- |" * len(head)}
{chr(10).join(lines)}

Exact cosines are those of all parameters. bergson and kronfluence leave out embeddings, head and norms: that is part
of their difference. "Scaled": a dense projection on a CPU draws its matrix in every call. It is timed at {TIMED}
numbers, to which its time is proportional; products of so few numbers say nothing. Memory is that of a process of its
own, with the model and Python's libraries in it. LESS is not a package, so it was not run.
"""
    publish(args.out, text.splitlines())


if __name__ == "__main__":
    main()
