"""The check of a sketch on one's own model: its numbers against ones that are computed another way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.oracle import flat_gradient, objective

import cropi
from cropi.cli import main
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.estimators import ESTIMATORS, make_estimator
from cropi.gradient.tokenize import TokenGroup, Tokenize
from cropi.model.policy import Policy
from cropi.options import Influence, Selecting
from cropi.ranking.pairwise import Pairwise
from cropi.ranking.resampling import uncertainty
from cropi.report.check import check_groups, check_job, error_by_seeds
from cropi.report.check_report import CheckReport
from cropi.report.exact import exact_gradients, leave_one_out, standard_errors
from cropi.sketching.interrupt import Interrupt, Interrupted
from cropi.sketching.job import SketchJob
from cropi.store.rows import RowInfo
from cropi_kernels import GradientSketcher, SketchSpec

SPEC = SketchSpec(dim=8192)
ESTIMATOR = ESTIMATORS["cropi"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(make_model(), make_tokenizer())


@pytest.fixture(scope="module")
def groups(policy: Policy) -> list[TokenGroup]:
    tokens = Tokenize(policy.tokenizer, policy.vocabulary, policy.context)
    return [tokens(group) for group in read(make_records(24))]


def test_leave_one_out_is_the_cosine_with_the_mean_of_the_others() -> None:
    rows = torch.randn(7, 20, dtype=torch.float64)
    want = [
        torch.nn.functional.cosine_similarity(rows[i], rows[[j for j in range(7) if j != i]].mean(0), dim=0)
        for i in range(7)
    ]
    torch.testing.assert_close(leave_one_out(rows @ rows.T), torch.stack(want))


def test_exact_gradients_are_those_of_each_response_in_float64(
    policy: Policy, groups: list[TokenGroup]
) -> None:
    """Against a double-precision model, one response at a time, the objective written out."""
    model = make_model().double()
    some = [g for g in groups if len(set(g.group.rewards)) > 1][:5]
    names = GradientSketcher(policy.model, SPEC).coverage.names
    flat = []
    for group in some:
        record = {"prompt_ids": group.prompt, "response_ids": group.responses, "rewards": group.group.rewards}
        flat.append(flat_gradient(model, objective(model, record)))
    rows = torch.stack(flat)
    made = exact_gradients(policy, some, names, ESTIMATOR, Behaviour("current"), tokens_per_batch=50)
    lengths = rows.norm(dim=1)
    # Kept in bfloat16: 2^-9 of every number, less in an inner product of many; float32 sums beside it.
    error = ((made.gram - rows @ rows.T) / lengths[:, None] / lengths).abs().max()
    assert error < 2**-9, float(error)
    assert sum(made.squares.values()) == pytest.approx(1)
    assert all(p.requires_grad and p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("size", [1e-25, 1e24])
def test_rewards_of_any_size_have_exact_gradients(policy: Policy, size: float) -> None:
    def made(scale: float) -> tuple[torch.Tensor, dict[str, float]]:
        responses = [[[8, 1], [9, i + 3, 1]] for i in range(4)]
        records = [
            {
                "id": str(i),
                "prompt_ids": [5, 7 + i],
                "response_ids": responses[i],
                "rewards": [scale * i, -scale],
            }
            for i in range(4)
        ]
        few = [
            TokenGroup(group, group.prompt_ids, group.response_ids, None, 1.0, None)
            for group in read(records)
        ]
        names = [name for name, _ in policy.model.named_parameters()]
        found = exact_gradients(policy, few, names, make_estimator("rloo"), Behaviour("current"))
        return leave_one_out(found.gram), found.squares

    # Kept in bfloat16: 2^-9 of every number, which rounds otherwise at another size.
    (got, shares), (want, whole) = made(size), made(1.0)
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=2**-9)
    assert shares == pytest.approx(whole, rel=2**-9)


def test_standard_errors_are_those_of_a_score_table() -> None:
    rows = torch.randn(9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.4
    want = []
    for i in range(9):
        others = rows[[j for j in range(9) if j != i]].numpy()
        mine = rows[[i]].numpy()
        pairs = Pairwise(
            [RowInfo("a")], [RowInfo(str(j)) for j in range(8)], mine @ others.T, np.linalg.norm(mine, axis=1),
            others @ others.T,
        )  # fmt: skip
        want.append(uncertainty(pairs, Influence(draws=2), Selecting(fraction=1.0)).stderr[0, 0])
    np.testing.assert_allclose(standard_errors(rows @ rows.T), want, rtol=1e-9)


@pytest.mark.long
def test_the_error_is_the_difference_of_sketched_and_exact_scores(
    policy: Policy, groups: list[TokenGroup]
) -> None:
    report = check_groups(policy, groups, spec=SPEC, estimator=ESTIMATOR, pool=1000)
    assert (
        report.method == "exact"
        and report.ok
        and report.prompts == sum(len(set(g.group.rewards)) > 1 for g in groups)
    )
    assert 0 < report.error < 4 * report.theory
    assert report.agreement is not None and report.agreement >= 0.5
    assert sum(report.by_type.values()) == pytest.approx(1) and set(report.by_layer) == {"0", "1"}
    assert report.layouts is not None and report.layouts < 1e-4 and report.batches is not None
    assert report.bytes_per_prompt == 4 * 8192 and "1,000 prompts: " in str(report)
    assert report.to_dict()["findings"][0]["name"] == "sketch error"
    assert report.ratio is None and "ratio 1 is taken: no log-probs" in str(report)
    assert str(report).endswith(
        f"\nverdict: the pool can be sketched: scores will be off by about {report.error:.4f}; against "
        f"{report.prompts - 1} validation prompts like the sample's, others would move them by about {report.moved:.4f}"
    )


@pytest.mark.long
def test_another_policy_is_a_warning(policy: Policy, groups: list[TokenGroup]) -> None:
    """The model's tokens are about equally likely; a behaviour of so many per token is this policy, others are not."""
    for logprob, level in ((-math.log(policy.vocabulary), "ok"), (-1.0, "warning")):
        some = [replace(g, logprobs=[[logprob] * len(tokens) for tokens in g.responses]) for g in groups]
        report = check_groups(policy, some, spec=SPEC, estimator=ESTIMATOR, behaviour="file", exact=False)
        (finding,) = (finding for finding in report.findings if finding.name == "policy")
        assert finding.level == level and report.ratio is not None and report.ess is not None
        assert finding.text.startswith(
            f"ratio {report.ratio:.3f}, effective sample size {report.ess:.2f} of the tokens"
        )
        assert ("another policy's" in finding.text) is (level == "warning")
        assert ("policy" in report.verdict) is (level == "warning") and report.ok


def test_other_seeds_estimate_the_error_of_this_one() -> None:
    """On made errors: the estimate follows those of the very seed, and is right on average."""
    draws = torch.Generator().manual_seed(0)
    truth, found, wanted = torch.randn(16, dtype=torch.float64, generator=draws), [], []
    for _ in range(400):
        mine, *rest = 0.01 * torch.randn(9, 16, dtype=torch.float64, generator=draws)
        found.append(error_by_seeds(truth + mine, truth + torch.stack(rest)) ** 2)
        wanted.append(float(mine.square().mean()))
    ratio = (torch.tensor(found) / torch.tensor(wanted)).sqrt()
    # The mean of 8 others is off by 0.01 / sqrt(8), so that a square of 16 errors is known to 2 / sqrt(8 * 16) = 18 %.
    assert 0.97 < (sum(found) / sum(wanted)) ** 0.5 < 1.03 and float(ratio.log().std()) < 0.12
    assert error_by_seeds(torch.zeros(4), torch.full((1, 4), 0.2)) == pytest.approx(0.2 / 2**0.5)


@pytest.mark.long
def test_other_seeds_estimate_the_error_that_exact_gradients_show(
    policy: Policy, groups: list[TokenGroup]
) -> None:
    """Of the same seed: eight others come within 20 % of it."""
    exact, estimated = [], []
    for seed in range(6):
        spec = SketchSpec(dim=8192, seed=10 * seed)
        exact.append(check_groups(policy, groups, spec=spec, estimator=ESTIMATOR, exact=True).error)
        report = check_groups(policy, groups, spec=spec, estimator=ESTIMATOR, exact=False)
        assert report.method == "seeds" and report.agreement is None and report.exact_seconds is None
        assert report.seeds == 8 and "against 8 other seeds" in str(report)
        estimated.append(report.error)
    ratios = torch.tensor(estimated) / torch.tensor(exact)
    assert (ratios - 1).abs().median() < 0.2 and 0.85 < float(ratios.mean()) < 1.15, ratios


@pytest.mark.long
def test_formed_gradients_are_sketched_once_more_by_one_other_seed(groups: list[TokenGroup]) -> None:
    """A scale that no tap knows: its gradient is formed, for one sketch a pass."""

    class Scaled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * torch.cat([self.scale[:32]])

    model = make_model()
    layer: Any = model.model.layers[1]
    layer.mlp = Scaled(layer.mlp)
    report = check_groups(
        Policy(model, make_tokenizer()), groups, spec=SPEC, estimator=ESTIMATOR, exact=False
    )
    assert (
        report.seeds == 1
        and 0 < report.error < 4 * report.theory
        and "against 1 other seed of" in str(report)
    )


@pytest.mark.long
def test_a_sketch_that_is_too_small_is_said_to_be(policy: Policy, groups: list[TokenGroup]) -> None:
    report = check_groups(policy, groups, spec=SketchSpec(dim=64), estimator=ESTIMATOR)
    assert report.findings[0].level != "ok" and "a larger --dim" in report.findings[0].text


def test_a_wrong_gradient_fails(
    policy: Policy, groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sketches of other gradients than the model's own: the error says so."""
    compute = GradientSketcher.policy_gradient

    def wrong(self: GradientSketcher, *args: Any, **kwargs: Any) -> Any:
        result = compute(self, *args, **kwargs)
        noise = torch.randn(result.sketches.shape, generator=torch.Generator().manual_seed(0))
        result.sketches.add_(
            noise * result.sketches.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        )
        return result

    monkeypatch.setattr(GradientSketcher, "policy_gradient", wrong)
    report = check_groups(policy, groups, spec=SPEC, estimator=ESTIMATOR)
    assert not report.ok and report.findings[0].level == "failed"


@pytest.mark.long
def test_models_with_adapters_count_the_adapters_alone(groups: list[TokenGroup]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: half of the gradients would vanish
            torch.nn.init.normal_(parameter, std=0.1)
    report = check_groups(Policy(model.eval(), make_tokenizer()), groups, spec=SPEC, estimator=ESTIMATOR)
    assert report.ok and all("lora" in kind for kind in report.by_type)


@pytest.mark.long
def test_a_sample_of_a_file_is_drawn_at_random_and_the_same_again(policy: Policy, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", make_records(60))
    job = SketchJob([path], None, SPEC)
    one, same, other = (check_job(policy, job, n=8, seed=seed, exact=False) for seed in (0, 0, 1))
    assert one.error == same.error != other.error and one.prompts == 8
    assert "60 prompts: " in str(one)
    with pytest.raises(CropiError, match="n must be at least 4, got 3"):
        check_job(policy, job, n=3)


@pytest.mark.long
def test_the_command_prints_a_verdict_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    path = write_lines(tmp_path / "t.jsonl", make_records(40))
    words = ["check", "--model", str(tmp_path / "m"), "--trajectories", str(path), "-n", "8", "--no-progress"]
    assert main([*words, "--dim", "8192", "--out", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    assert "sketch error" in shown and "rms over 8 prompts, against exact gradients" in shown
    assert json.loads((tmp_path / "c.json").read_text())["ok"] is True
    assert main([*words, "--dim", "8192", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 8
    assert main([*words, "--dim", "64"]) == 1, "scripts see that it failed"
    said = capsys.readouterr().out
    assert (
        "FAILED" in said
        and "verdict: do not sketch the pool yet: what failed (sketch error) would make" in said
    )


@pytest.mark.long
def test_ctrl_c_ends_the_check(
    policy: Policy, groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Interrupt):
        def __enter__(self) -> Interrupt:
            self.asked = True
            return self

    monkeypatch.setattr("cropi.sketching.groups.Interrupt", Asked)
    with pytest.raises(Interrupted):
        check_groups(policy, groups, spec=SPEC, estimator=ESTIMATOR, tokens_per_batch=16)


def test_the_front_door_checks_what_is_in_memory() -> None:
    report = cropi.check(make_model(), make_records(24), make_tokenizer(), n=8, dim=8192, progress=False)
    assert (
        report.ok and report.prompts == 8 and repr(report).startswith("CheckReport(8 prompts: ok, error 0.0")
    )


@pytest.mark.parametrize(
    "error,level", [(0.0, "ok"), (0.05, "warning"), (0.2, "failed"), (math.nan, "failed")]
)
def test_an_error_that_is_no_number_fails(error: float, level: str) -> None:
    """Every comparison with NaN is false: it was a warning, and the pool could be sketched."""
    report = CheckReport(8, 1024, "exact", error, 0.03, None, None, None, None, 1.0, None, 1.0, 1, "all")
    report.judge(torch.float32, None, 0)
    assert report.findings[0].level == level and report.ok == (level != "failed")


@pytest.fixture
def equal(groups: list[TokenGroup]) -> Iterator[list[TokenGroup]]:
    yield [group for group in groups if len(set(group.group.rewards)) == 1]


def test_prompts_without_a_gradient_make_no_sample(policy: Policy, equal: list[TokenGroup]) -> None:
    assert equal
    with pytest.raises(
        CropiError, match=r"the sample holds 0 prompts with a gradient \(\d+ in all\): give at"
    ):
        check_groups(policy, equal, spec=SPEC)
