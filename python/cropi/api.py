"""What ``import cropi`` offers as functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cropi import pipeline
from cropi.data.forms import parse_columns
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.errors import CropiError, article, as_keywords, shown
from cropi.files import check_ending, path_of
from cropi.model.policy import Policy
from cropi.option_fields import keywords_of, names_of, split
from cropi.options import Influence, Loading, Selecting, Sketching
from cropi.pipeline import Setup
from cropi.ranking import selection
from cropi.ranking.given import given_stores
from cropi.ranking.pairwise import Neighbour
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection
from cropi.ranking.uncertainty import of_choice
from cropi.report.check import check_job
from cropi.report.check_report import CheckReport
from cropi.report.html import ReportInput
from cropi.report.html import write_report as write_page
from cropi.sketching.interrupt import Interrupted
from cropi.sketching.job import make_job
from cropi.sketching.noise import sampled
from cropi.sketching.run import sketch as run_job
from cropi.store.store import SketchStore

OF_RANKING = ("method", "rrf_constant", "per", "quota")
# The fields of Selecting that a resampled choice depends on: those of the ranking, and of the number of prompts.
OF_CHOICE = ("fraction", "count", "pool", *OF_RANKING)

# How messages name the options of these functions.
KEYWORDS = keywords_of(Loading, Sketching, Influence, Selecting, more=("out", "source", "behaviour_model"))


@as_keywords(KEYWORDS)
def score(
    model: Any,
    train: Any,
    valid: Any,
    tokenizer: Any = None,
    *,
    out: str | Path | None = None,
    behaviour_model: Any = None,
    source: str = "auto",
    noise: bool = False,
    progress: bool = True,
    **options: Any,
) -> Scores:
    """Score training prompts by how well their policy gradients point along those of validation prompts.

    Args:
        model: the current policy: a name or folder, a module (with ``tokenizer``, where text is to be tokenised), or a
            :class:`cropi.Policy`.
        train: stored trajectories of the training prompts, several scored responses to each: a list of records
            (dictionaries, docs/trajectories.md), a ``datasets.Dataset``, a path, or a list of paths.
        valid: the same for validation prompts; or a dict of them by the name of their set, which is then no other one
            that a record names.
        tokenizer: the tokenizer of ``model`` where that is a module.
        out: folder for the sketches; prompts that it already holds are not computed again. None keeps them in memory.
        behaviour_model: the model that made the responses, where records have no log-probs and it is not ``model``.
        source: what wrote the files that ``train`` and ``valid`` name, a dump of a trainer or of an engine among them
            (see :class:`cropi.options.Reading`); "auto" recognises it by their content.
        noise: also sketch how much each gradient varies with the responses that were sampled, so that the uncertainty
            of the scores includes it (:mod:`cropi.ranking.response_noise`).
        progress: show progress: bars on a terminal and in a notebook, elsewhere a line a minute.
        options: the fields of :class:`cropi.options.Sketching` and :class:`cropi.options.Influence`, such as
            ``estimator="ppo"``, ``dim=8192``, ``metric="dot"``; for a model by its name, those of
            :class:`cropi.options.Loading` (``dtype``, ``device``); and those of :data:`OF_CHOICE`, such as
            ``fraction=0.2``: the choice that ``p_selected`` is of (default: the best tenth, one prompt at least).

    Returns:
        The scores, with one row a training prompt and one column a validation set.

    Raises:
        CropiError: a bad argument or record; names it, its value and the remedy.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> def record(name, first):                       # token ids need no tokenizer
    ...     return {"id": name, "prompt_ids": [first, 7], "response_ids": [[8, 1], [9, 10, 1]], "rewards": [1.0, 0.0]}
    >>> train, valid = [record(f"t{i}", 20 + i) for i in range(4)], [record("v", 21)]
    >>> scores = score(model, train, valid, dim=1024, progress=False)
    >>> scores
    Scores(4 prompts, 4 usable, against 'valid')
    >>> scores.top(n=1)[0][0], scores.select(0.25).ids
    ('t1', ['t1'])
    """
    _not_none(train=train, valid=valid)
    policy, beta, rest = _policies(model, tokenizer, behaviour_model, progress, options)
    choice, least, rest = _choice(rest)
    sketching, compare = split(rest, Sketching, Influence, also=(*names_of(Loading), *OF_CHOICE), by=score)
    job = make_job(sketching, (), None, behaviour_model=beta, notes={"model": policy.name})
    replace(job, noise=noise)  # what does not go with it shows here
    setup = Setup(job, compare, Selecting(fraction=1.0))  # nothing is chosen here, so no pool is too small
    train, valid = _opened(policy, sketching, train, source), _opened(policy, sketching, valid, source)
    folder = None if out is None else Path(out)
    for name in valid if isinstance(valid, dict) and folder is not None else ():
        if Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
            raise CropiError(
                f"valid: the store of the set {shown(name)} would lie outside of out={str(folder)!r}: give the set a "
                "name that does not begin with '/' and has no '..' in it"
            )
    checked = pipeline.check(policy, train, valid, setup, option="valid", named=True)

    def at(name: str) -> Path | None:
        return None if folder is None else folder / name

    stores = pipeline.sketch_all(policy, checked, setup, at, progress=progress)
    of_noise = (
        pipeline.noise_stores(policy, checked, job, sampled(stores["train"]), at, progress=progress)
        if noise
        else ()
    )
    train = stores.pop("train")
    return pipeline.score(train, list(stores.values()), compare, choice, of_noise, least=least, checked=True)


@as_keywords(KEYWORDS)
def sketch(
    model: Any,
    trajectories: Any,
    tokenizer: Any = None,
    *,
    out: str | Path | None = None,
    set: str | None = None,
    behaviour_model: Any = None,
    source: str = "auto",
    noise: bool = False,
    progress: bool = True,
    **options: Any,
) -> SketchStore:
    """Sketch the policy gradient of every prompt.

    Args:
        model, tokenizer, behaviour_model, source, progress: as for :func:`cropi.score`.
        trajectories: as ``train`` there.
        out: the store's folder; prompts that it already holds are not computed again. None keeps the
            sketches in memory.
        set: the validation set of records that do not name one.
        noise: instead of each gradient, sketch a random draw of its noise (how much it varies with the responses that
            were sampled), to be given to :func:`cropi.influence` as ``noise``.
        options: the fields of :class:`cropi.options.Sketching`.

    Returns:
        The sketches, one row a prompt.

    Raises:
        CropiError: bad records or options, or a store that was made from other records or with other options.
        Interrupted: Ctrl-C was pressed; finished prompts are in the store. It is a KeyboardInterrupt.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> records = [{"id": "a", "prompt_ids": [5, 7], "response_ids": [[8, 1], [9, 1]], "rewards": [1.0, 0.0]}]
    >>> store = sketch(model, records, dim=1024, progress=False)
    >>> len(store), [vectors.shape for rows, vectors in store.shards()]
    (1, [torch.Size([1, 1024])])
    """
    _not_none(trajectories=trajectories)
    policy, beta, rest = _policies(model, tokenizer, behaviour_model, progress, options)
    (sketching,) = split(rest, Sketching, also=names_of(Loading), by=sketch)
    trajectories = _opened(policy, sketching, trajectories, source)
    job = make_job(
        sketching, trajectories, out, set=set, behaviour_model=beta, notes={"model": policy.name}, noise=noise
    )
    summary = run_job(policy, job, progress=progress)
    if summary.interrupted:
        raise Interrupted(out, summary)
    assert summary.store is not None
    return summary.store


@as_keywords(KEYWORDS)
def influence(
    train: Any,
    valid: Any,
    *,
    noise: Sequence[SketchStore] = (),
    **options: Any,
) -> Scores:
    """Score the sketches of training prompts against those of validation prompts.

    Args:
        train: sketches of training prompts: a :class:`cropi.SketchStore`, the batch of :func:`cropi.score_batch` or of
            `cropi.LiveSketcher`, or floats ``[n, dim]``, a tensor or an array: of any examples, by any projection.
            Ids of the last two are the numbers of the rows, with leading zeros.
        valid: the same of validation prompts, or several of them in a list (where numbers of rows stand behind the
            place in it, as ``1-03``); prompts with the same ``set`` are one set. Batches and floats may be a dict by
            the name of their set.
        noise: stores that ``cropi.sketch(..., noise=True)`` made of some or all of these prompts: the uncertainty then
            includes the responses.
        options: the fields of :class:`cropi.options.Influence`: ``metric``, ``mean``, ``aggregate``, ``minus``,
            ``minus_weight``, ``max_valid``, ``draws``, ``valid_seed``; and those of :data:`OF_CHOICE`, as for
            :func:`cropi.score`.

    Returns:
        The scores, with one row a training prompt and one column a validation set.

    Raises:
        CropiError: the stores cannot be compared, one is unfinished, or a validation set has no usable prompt.

    >>> from cropi.store.memory import MemoryStore
    >>> from cropi.store.rows import RowInfo
    >>> import torch
    >>> train, valid = (MemoryStore({"spec": {"dim": 64}}) for _ in range(2))
    >>> for name, vector in (("a", torch.ones(64)), ("b", -torch.ones(64))):
    ...     _ = train.add(RowInfo(name, norm=8.0), vector)
    >>> _ = valid.add(RowInfo("v", set="sums"), torch.ones(64))
    >>> train.finish(), valid.finish()
    (None, None)
    >>> influence(train, valid).top("sums")
    [('a', 1.0), ('b', -1.0)]
    >>> influence(torch.eye(3, 64), {"sums": torch.ones(1, 64)}).table.tolist()
    [[0.125], [0.125], [0.125]]
    """
    choice, least, rest = _choice(options)
    (given,) = split(rest, Influence, also=OF_CHOICE, by=influence)
    train, stores = given_stores(train, valid)
    if not isinstance(noise, (list, tuple)) or not all(isinstance(one, SketchStore) for one in noise):
        raise CropiError(
            f"noise is {noise!r:.100}: give a list of SketchStores (cropi.sketch(..., noise=True))"
        )
    return pipeline.score(train, stores, given, choice, noise, least=least)


@as_keywords(KEYWORDS)
def select(scores: Scores, fraction: float = 0.1, **options: Any) -> Selection:
    """Choose the best fraction of the prompts.

    Args:
        scores: the result of :func:`cropi.score` or :func:`cropi.influence`.
        fraction: share of the pool, in (0, 1].
        options: the fields of :class:`cropi.options.Selecting`, which are those of `cropi select`: ``count``,
            ``method``, ``pool``, ``per``, ``quota``, ``min_score``, ``confidence``, ``draw``, ``dedup``, ``diversity``
            and others.

    Returns:
        The chosen prompts, best first.

    Raises:
        CropiError: ``scores`` is not a :class:`cropi.Scores`, or ``fraction`` chooses no prompt.

    >>> import numpy as np
    >>> from cropi.store.rows import RowInfo
    >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
    >>> select(scores, fraction=0.5)
    Selection(1 of 2 prompts by rrf: 'b')
    """
    if not isinstance(scores, Scores):
        raise CropiError(
            f"scores is {article(type(scores).__name__)}: give the Scores of cropi.score or cropi.influence"
        )
    (given,) = split({"fraction": fraction, **options}, Selecting)
    return selection.select(scores, given)


@as_keywords(KEYWORDS)
def write_report(
    chosen: Selection,
    path: str | Path = "report.html",
    train: Any = None,
    *,
    neighbours: Mapping[str, tuple[list[Neighbour], list[Neighbour]]] | None = None,
    check: CheckReport | None = None,
    columns: str | Mapping[str, str] | None = None,
) -> None:
    """Write the page of `cropi report` for a choice that was made in Python: one HTML file that needs no network.

    Args:
        chosen: the result of :func:`cropi.select` or :meth:`cropi.Scores.select`.
        path: the page.
        train: the training prompts' trajectories, as for :func:`cropi.score`, whose texts, responses and rewards are
            then shown.
        neighbours: the result of :func:`cropi.neighbours`, to show the training prompts nearest to validation prompts.
        check: the result of :func:`cropi.check`.
        columns: names of the columns of ``train``.

    Raises:
        CropiError: ``chosen`` is not a :class:`cropi.Selection`, ``train`` lacks a chosen prompt, bad records, or
            a page that cannot be written, or whose path ends as another format does.

    >>> import numpy as np, tempfile
    >>> from cropi.store.rows import RowInfo
    >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
    >>> records = [{"id": name, "prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0]} for name in "ab"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(scores.select(0.5), f"{folder}/report.html", records)
    """
    if not isinstance(chosen, Selection):
        raise CropiError(
            f"chosen is {article(type(chosen).__name__)}: give a Selection (scores.select, cropi.select)"
        )
    if check is not None and not isinstance(check, CheckReport):
        raise CropiError(f"check is {article(type(check).__name__)}: give the CheckReport of cropi.check")
    from cropi.trainers.dumps import auto

    path = path_of(path, "path", "a file that ends in .html")
    check_ending("path", path, (".html",))
    scores = chosen.scores
    groups: Iterable[PromptGroup] = ()
    if train is not None:
        groups = records = read(auto.opened(train, columns=columns), columns=columns, rewards=None)
        # Records of other prompts would make a page without a text.
        for _ in records.take(chosen.ids):
            pass
    made = scores.meta.get("selection") or {}  # of the choice that the table was written with
    same = None
    if made and chosen.settings:
        other = any(made.get(name) != chosen.settings.get(name) for name in OF_RANKING)
        same = False if other else made == chosen.settings or None
    sure, missing = of_choice(scores, len(chosen), same, chosen.method)
    given = ReportInput(
        scores, chosen, groups, uncertainty=sure, uncertainty_missing=missing,
        neighbours=neighbours or {}, check=None if check is None else check.to_dict(),
    )  # fmt: skip
    write_page(path, given)


@as_keywords(KEYWORDS)
def check(
    model: Any,
    trajectories: Any,
    tokenizer: Any = None,
    *,
    n: int = 16,
    seed: int = 0,
    exact: bool | None = None,
    behaviour_model: Any = None,
    source: str = "auto",
    progress: bool = True,
    **options: Any,
) -> CheckReport:
    """Compare sketches with exact gradients on some of your prompts: the error of a score, faults of the model
    or its layout, and what a whole pool would cost.

    Args:
        model, trajectories, tokenizer, behaviour_model, source: as for :func:`cropi.sketch`.
        n: prompts in the sample, at least 4; the error is measured with a relative error of about ``1 / sqrt(2 n)``.
        seed: of the draw.
        exact: compare with exact gradients (True), eight other seeds (False), or as memory allows (None).
        progress: say what is being done.
        options: the fields of :class:`cropi.options.Sketching`.

    Returns:
        The report. Printed, it is a verdict of some lines; ``ok`` is True where nothing failed.

    Raises:
        CropiError: bad records or options, or fewer than four prompts with a gradient.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> records = [{"id": str(i), "prompt_ids": [5, i], "response_ids": [[8, 1], [9, 1]], "rewards": [1.0, 0.0]}
    ...     for i in range(6)]
    >>> check(model, records, dim=8192, progress=False).ok
    True
    """
    _not_none(trajectories=trajectories)
    policy, beta, rest = _policies(model, tokenizer, behaviour_model, progress, options)
    (sketching,) = split(rest, Sketching, also=names_of(Loading), by=check)
    trajectories = _opened(policy, sketching, trajectories, source)
    job = make_job(sketching, trajectories, None, behaviour_model=beta)
    return check_job(policy, job, n=n, seed=seed, exact=exact, say=print if progress else lambda text: None)


def _not_none(**given: Any) -> None:
    """Refuse None, which a loader that found nothing may have returned."""
    for name, value in given.items():
        sets = {f"{name}[{key!r}]": one for key, one in value.items()} if isinstance(value, dict) else {}
        for called, one in {name: value, **sets}.items():
            if one is None:
                raise CropiError(
                    f"{called} is None: give trajectories (a path, a list of paths or of records, a datasets.Dataset)"
                )


def _opened(policy: Policy, options: Sketching, given: Any, source: str) -> Any:
    """Trajectories, with records in place of trainers' dumps; of a dictionary, every value."""
    from cropi.trainers.dumps import auto

    if isinstance(given, dict) and all(
        isinstance(value, (str, Path, list, tuple)) for value in given.values()
    ):
        return {name: _opened(policy, options, value, source) for name, value in given.items()}
    reading = auto.Reading(columns=parse_columns(options.columns), tokenizer=lambda: policy.tokenizer)
    return auto.opened(given, source, skip_bad=options.skip_bad, columns=options.columns, reading=reading)


def _policies(
    model: Any, tokenizer: Any, behaviour_model: Any, progress: bool, options: dict[str, Any]
) -> tuple[Policy, Policy | None, dict[str, Any]]:
    """The policy, the one that made the responses if it is given, and the options that are not about loading them."""
    loading, rest = _loading(options)
    if not isinstance(progress, bool):
        raise CropiError(f"progress must be True or False, got {progress!r}")

    def made(given: Any, tokenizer: Any = None, **loading: Any) -> Policy:
        if isinstance(given, Policy):
            return Policy.of(given, tokenizer, **loading)
        return Policy(given, tokenizer, progress=progress, **loading)

    policy = made(model, tokenizer, **loading)
    if behaviour_model is None:
        return policy, None, rest
    named = isinstance(behaviour_model, (str, Path))
    return policy, made(behaviour_model, **(loading if named else {})), rest


def _choice(options: dict[str, Any]) -> tuple[Selecting, int, dict[str, Any]]:
    """The choice that scores are resampled for, how many prompts it has at least, and the other options."""
    given = {name: value for name, value in options.items() if name in OF_CHOICE}
    # A tenth, of which nothing was said, of fewer than ten prompts is none: there would be no standard errors.
    least = 0 if {"fraction", "count"} & given.keys() else 1
    rest = {name: value for name, value in options.items() if name not in OF_CHOICE}
    return split(given, Selecting)[0], least, rest


def _loading(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of loading, checked, and the others."""
    own = {name: options[name] for name in names_of(Loading) if name in options}
    split(own, Loading)
    return own, {name: value for name, value in options.items() if name not in own}
