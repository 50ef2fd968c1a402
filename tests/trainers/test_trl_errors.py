"""Bad input to the TRL adapter: an error that says what to do, before a step is trained."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import fuzz, trl_runs
from support.made_data import make_model, make_tokenizer

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

from support.trl_runs import arguments, dataset, digits, recorded, selected, staged, stored  # noqa: E402

from cropi.errors import CropiError  # noqa: E402
from cropi.sealed import sealed  # noqa: E402
from cropi.trainers.trl import Curriculum, curriculum, versions  # noqa: E402
from cropi.trainers.trl import recording as record  # noqa: E402
from cropi.trainers.trl.rollout_log import rewind  # noqa: E402
from cropi.trainers.trl.stage_state import STATE  # noqa: E402
from cropi.trainers.trl.stages import Stages  # noqa: E402
from cropi.trainers.versions import UntestedVersion  # noqa: E402


@pytest.mark.long
def test_a_bad_record_of_the_files_is_left_out_by_a_keyword(tmp_path: Path) -> None:
    """The message names the keyword of Curriculum beside the command line's flag, and each step takes it."""
    given = trl_runs.files(tmp_path)
    lines = given["train"].read_text().splitlines()
    bad, lines[3] = json.loads(lines[3])["id"], lines[3][:-1]
    given["train"].write_text("\n".join(lines) + "\n")
    with pytest.raises(CropiError, match=r"--skip-bad \(in Python skip_bad=True\)$"):
        staged(tmp_path / "a", given)
    options = given | {"skip_bad": True, "use_recorded": True, "behaviour": "current"}
    staged(tmp_path / "b", options, max_steps=4).train()
    for stage in (0, 1):
        chosen = selected(tmp_path / "b", stage)
        assert chosen and bad not in chosen


@pytest.mark.long
def test_a_message_names_what_stands_for_options_that_a_curriculum_lacks(tmp_path: Path) -> None:
    """It has no too_long: a prompt that does not fit is left out as a bad record is."""
    given = trl_runs.files(tmp_path)
    lines = [json.loads(line) for line in given["train"].read_text().splitlines()]
    lines[3] |= {"response_ids": [ids * 500 for ids in lines[3]["response_ids"]]}
    lines[3].pop("logprobs", None)
    given["train"].write_text("".join(json.dumps(line | {"logprobs": None}) + "\n" for line in lines))
    with pytest.raises(
        CropiError, match=r"context of \d+; pass --too-long skip .*\(in Python skip_bad=True\)$"
    ):
        staged(tmp_path / "a", given, max_steps=2).train()
    staged(tmp_path / "b", given | {"skip_bad": True}, max_steps=2).train()
    assert lines[3]["id"] not in selected(tmp_path / "b", 0)


# ----------------------------------------------------------------------------------------------- versions
def test_installed_version_is_in_the_tested_range_and_keeps_the_contract() -> None:
    import trl

    assert versions.check_version() == trl.__version__
    assert versions.broken_contract(trl.GRPOTrainer) == []

    class HandsOn(trl.GRPOTrainer):  # as TRL 1.14.2's own method does
        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any: ...

    class Other(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Any, **kwargs: Any) -> Any: ...

    assert versions.broken_contract(HandsOn) == []
    (broken,) = versions.broken_contract(Other)
    assert broken.endswith("lacks attention_mask, logits_to_keep, batch_size")


@pytest.mark.long
def test_version_below_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROPI_TRL_UNTESTED", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.7.1")
    message = rf"trl 1.7.1 is installed.*tested with 1.8.0 to 1.16.0.*pip install '{versions.WANTED}'.*set CROPI_TRL"
    for factory in (curriculum, record):
        with pytest.raises(CropiError, match=message):
            factory()
        assert factory(allow_untested=True).__mro__[1].__name__.endswith("Mixin")
    monkeypatch.setenv("CROPI_TRL_UNTESTED", "1")
    assert versions.check_version() == "1.7.1"


@pytest.mark.long
@pytest.mark.parametrize("other", ["1.17.0", "2.0.0"])
def test_version_above_the_tested_range_is_warned_of_and_checked(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    class Newer(GRPOTrainer):
        _save_checkpoint = None  # type: ignore[assignment]

    monkeypatch.delenv("CROPI_TRL_UNTESTED", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: other)
    message = (
        rf"trl {other} is installed.*tested with 1.8.0 to 1.16.0.*checked by name.*CROPI_TRL_UNTESTED=1 turns"
    )
    for factory in (curriculum, record):
        with pytest.warns(UntestedVersion, match=message):
            assert factory().__mro__[1].__name__.endswith("Mixin")
        with pytest.warns(UntestedVersion), pytest.raises(CropiError, match=r"_save_checkpoint\(\) is gone"):
            factory(Newer)
    monkeypatch.setenv("CROPI_TRL_UNTESTED", "1")
    assert versions.check_version() == other


def test_trl_1_15_on_a_cpu_with_triton_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.15.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for there in (True, False):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=there: object() if there else None)
        if not there:
            assert versions.check_version() == "1.15.0"
            continue
        for allowed in (False, True):
            with pytest.raises(CropiError, match="0 active drivers.*trl>=1.16.*uninstall triton"):
                versions.check_version(allow_untested=allowed)


@pytest.mark.long
def test_whatever_is_read_from_a_trainer_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL 1.7, which has every method and lacks an attribute that the recorder reads."""
    import trl

    assert {"environment_factories", "reward_weights", "num_generations_eval"} <= versions._attributes(
        trl.GRPOTrainer
    )
    monkeypatch.setattr(versions, "ATTRIBUTES", (*versions.ATTRIBUTES, "not_there"))
    with pytest.raises(CropiError, match=r"GRPOTrainer of trl .*: the trainer has no not_there; pip install"):
        versions.check_trainer_class(trl.GRPOTrainer)
    monkeypatch.setattr(versions, "OPTIONS", (*versions.OPTIONS, "no_option"))
    assert "GRPOConfig has no no_option" in versions.broken_contract(trl.GRPOTrainer)


@pytest.mark.long
def test_what_a_built_trainer_lacks_is_named_before_training(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    class Without(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            del self.reward_weights

    given = dict(
        model=make_model(), reward_funcs=digits, train_dataset=dataset(8), processing_class=make_tokenizer()
    )
    with pytest.raises(CropiError, match="Without of trl .*: the trainer has no reward_weights"):
        record(Without)(**given, args=arguments(tmp_path))

    class Other(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            return {key: value for key, value in output.items() if key != "prompt_mask"}

    trainer = record(Other)(**given, args=arguments(tmp_path))
    with pytest.raises(CropiError, match=r"_generate_and_score_completions\(\) gives no prompt_mask"):
        trainer.train()


def test_missing_trl_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", gone)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cropi-kernels\[trl\]'"):
        curriculum()


def test_changed_methods_are_named() -> None:
    from trl import GRPOTrainer

    class Moved(GRPOTrainer):
        _save_checkpoint = None  # type: ignore[assignment]

        def _compute_loss(self, model: Any, batch: Any) -> Any:
            return None

    with pytest.raises(CropiError, match=r"_compute_loss\(\) lacks inputs; _save_checkpoint\(\) is gone"):
        curriculum(Moved)
    with pytest.raises(CropiError, match="must be trl.GRPOTrainer or a subclass"):
        curriculum(dict)  # type: ignore[type-var]


# ----------------------------------------------------------------------------------------------- datasets
@pytest.mark.long
def test_ids_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    loading = {"model": "no/such-model"}  # reached only if the dataset is let through
    with pytest.raises(
        CropiError, match=r"no column 'id' \(its columns: prompt, answer, task\).*with_indices=True"
    ):
        staged(tmp_path, train_dataset=dataset(8, id=None), **loading)
    with pytest.raises(CropiError, match="rows 0 and 1 have the same id 'twice'"):
        staged(tmp_path, train_dataset=dataset(8, id="twice"), **loading)
    with pytest.raises(CropiError, match="row 0 has the id 1.5"):
        staged(tmp_path, train_dataset=dataset(8, id=1.5), **loading)
    with pytest.raises(CropiError, match="eval_dataset has no column 'id'"):
        recorded(tmp_path, eval_dataset=dataset(8, id=None), **loading)
    with pytest.raises(
        CropiError, match=r"eval_dataset\['b'\] and eval_dataset\['a'\] both have the id 'p0-000'"
    ):
        recorded(tmp_path, eval_dataset={"a": dataset(2), "b": dataset(2)}, **loading)
    with pytest.raises(CropiError, match="train_dataset is missing"):
        staged(tmp_path, train_dataset=None, **loading)


def test_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="IterableDataset.*streaming=False"):
        staged(tmp_path, train_dataset=dataset(8).to_iterable_dataset())


def test_another_id_key(tmp_path: Path) -> None:
    from cropi.trainers.trl import Recording

    trainer = recorded(
        tmp_path, Recording(id_key="number"), eval_dataset=None, max_steps=1, remove_unused_columns=True,
        train_dataset=dataset(20, id=None).add_column("number", list(range(20))),
    )  # fmt: skip
    trainer.train()
    text = (tmp_path / "cropi/rollouts/train-rank00000.jsonl").read_text()
    assert text.count('"id": "') == 2


# ----------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_steps": 0}, "stage_steps must be an integer of at least 1, got 0"),
        ({"fraction": 1.5}, r"fraction must be in \(0, 1\], got 1.5"),
        ({"method": "best"}, "method must be one of rrf, .*got 'best'"),
        ({"estimator": "trpo"}, "estimator must be one of"),
        ({"train": "nowhere.jsonl"}, "train: there is no trajectory file nowhere.jsonl"),
        ({"valid": []}, "valid is an empty list"),
        ({"recording": None}, "train is None, so it comes from what this run records"),
        (
            {"use_recorded": True, "train": __file__, "valid": __file__, "recording": None},
            "use_recorded needs rollouts",
        ),
        (
            {"use_recorded": True, "train": [__file__, __file__], "valid": __file__, "per": "file"},
            "use_recorded puts rollouts .* in one file",
        ),
    ],
)
def test_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CropiError, match=message):
        Curriculum(**({"stage_steps": 2} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": -1}, "max_steps is -1.*max_steps=10 for 5 stages of 2"),
        (
            {"ignore_data_skip": True},
            "ignore_data_skip is True: a resumed run would begin its stage's prompts anew",
        ),
        ({"steps_per_generation": 4}, "stage_steps 2 x gradient_accumulation_steps 1 is not a multiple"),
        ({"eval_dataset": None}, "valid is None.*eval_dataset, which is missing"),
        ({"num_generations_eval": 1}, "num_generations_eval is 1"),
        (
            {"num_generations_eval": 6},
            "per_device_eval_batch_size 8 is not a multiple of num_generations_eval 6, .*_batch_size to 12, or",
        ),
        ({"per_device_train_batch_size": 128}, "stage 0 has 20 prompts, but one generation batch takes 32"),
    ],
)
def test_arguments(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CropiError, match=message):
        staged(tmp_path, **change)


def test_curriculum_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="curriculum must be a Curriculum, got dict"):
        curriculum()(model=make_model(), args=arguments(tmp_path), curriculum={"stage_steps": 2})


# ----------------------------------------------------------------------------------------------- stages
def flat(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.long
def test_stage_with_nothing_to_select(tmp_path: Path) -> None:
    valid = stored(tmp_path / "valid.jsonl", seed=1, count=8)
    trainer = staged(tmp_path / "a", {"valid": valid}, reward_funcs=flat)
    with pytest.raises(
        CropiError,
        match=r"stage 1: there is nothing to select: none of the 4 .*4 with equal rewards.*on_nothing",
    ):
        trainer.train()
    assert trainer.state.global_step == 2
    kept = staged(tmp_path / "b", {"valid": valid, "on_nothing": "keep"}, reward_funcs=flat)
    kept.train()
    assert kept.state.global_step == 6


def test_validation_sets_must_be_covered(tmp_path: Path) -> None:
    files = trl_runs.files(tmp_path, sets=["x", "y"])
    with pytest.raises(
        CropiError,
        match="valid_sets: no trajectory covers the validation set 'z'; there are trajectories of 'x', 'y'",
    ):
        staged(tmp_path / "a", {**files, "valid_sets": ["x", "z"]}).train()
    equal = stored(tmp_path / "equal.jsonl", seed=1, count=8, set="x", rewards=[1.0, 1.0, 1.0, 1.0])
    with pytest.raises(
        CropiError, match="no trajectory covers the validation set 'x' usefully: none of its 8 prompts"
    ):
        staged(tmp_path / "b", {**files, "valid": equal}).train()


def test_files_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    loading = {"model": "no/such-model"}
    files = trl_runs.files(tmp_path)
    equal = stored(tmp_path / "equal.jsonl", seed=0, count=8, rewards=[0.0] * 4)
    for change, message in (
        ({"valid_sets": ["z"]}, "no trajectory covers the validation set 'z'"),
        ({"train": equal}, "stage 0: there is nothing to select: none of the 8 training prompts"),
        ({"behaviour": "file"}, "no 'logprobs' in this record"),
        (
            {"use_recorded": True},
            "without log-probs, with recorded ones with.*set behaviour='current', or Recording",
        ),
    ):
        with pytest.raises(CropiError, match=message):
            staged(tmp_path, files | change, **loading)


def test_trajectories_of_other_prompts(tmp_path: Path) -> None:
    files = trl_runs.files(tmp_path) | {"train": stored(tmp_path / "train.jsonl", seed=3, count=16)}
    with pytest.raises(
        CropiError, match="none of the trajectories in .*train.jsonl belongs to a prompt of the dataset"
    ):
        staged(tmp_path / "a", files).train()


@pytest.mark.long
def test_too_few_selected_prompts(tmp_path: Path) -> None:
    """Known when the trainer is built: from files, and by a count of prompts that are yet to be recorded."""
    files = trl_runs.files(tmp_path)
    unknown = stored(tmp_path / "more.jsonl", seed=3, count=16)  # of no prompt of the dataset
    for options, message in (
        (
            files | {"fraction": 0.1},
            "stage 0 has 1 prompts, but one generation batch takes 2.*raise fraction or count",
        ),
        (files | {"fraction": 0.1, "train": [files["train"], unknown]}, "stage 0 has 1 prompts"),
        (
            {"valid": files["valid"], "count": 1, "fraction": 0.1},
            "stage 1 has 1 prompts, but one generation batch takes 2",
        ),
        (files | {"count": 99, "fraction": 0.1}, "count 99 is more than the 11 prompts that have a gradient"),
        (files | {"quota": ["sum=2"]}, "quota: there is no task 'sum'; "),
        (files | {"confidence": 0.9, "max_valid": 1}, "confidence needs resampled scores, and"),
        (
            {"valid": files["valid"], "draw": "p_selected", "max_valid": 1},
            "draw p_selected needs resampled scores, ",
        ),
    ):
        with pytest.raises(CropiError, match=message):
            staged(tmp_path / "a", options)


@pytest.mark.long
def test_a_stage_of_recorded_prompts_has_enough_for_a_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two prompts are recorded in a stage of one batch, and half of them is one: training goes on with both."""
    valid = stored(tmp_path / "valid.jsonl", seed=1, count=8)
    trainer = staged(tmp_path / "a", {"valid": valid, "stage_steps": 1, "fraction": 0.5}, max_steps=2)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 2 and len(selected(tmp_path / "a", 1)) == 2
    assert (
        "fraction 0.5 of 2 prompts chooses fewer than one generation batch takes; 2 are chosen" in caplog.text
    )


def unscored(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


@pytest.mark.long
def test_rewards_that_are_all_none_do_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL warns of them and trains on."""
    valid = stored(tmp_path / "valid.jsonl", seed=1, count=8)
    trainer = staged(tmp_path / "a", {"valid": valid}, reward_funcs=unscored)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert "fewer than two responses that a reward function scored" in caplog.text
    assert "the prompts of the stage before are kept" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("steps, seen", [(2, 4), (9, 18), (10, 20)])
def test_prompts_that_the_first_stage_does_not_reach_are_counted(
    steps: int, seen: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = staged(tmp_path, {"stage_steps": steps}, max_steps=2 * steps)._cropi
    for resumed in (True, False):
        stages._resumed = resumed
        with caplog.at_level("WARNING"):
            stages.tell_what_is_seen()
        told = f"{seen} of the 20 of train_dataset, and never the others" in caplog.text
        assert told == (seen < 20 and not resumed), "nothing can be done about it in a run that is resumed"


@pytest.mark.long
def test_import_is_cheap() -> None:
    import subprocess
    import sys

    heavy = "{'trl', 'transformers', 'datasets'}"
    code = f"import sys, cropi.trainers, cropi.trainers.trl; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------- checkpoints
def test_fuzz_any_state_in_a_checkpoint_is_taken_or_ends_in_words() -> None:
    """Also one whose checksum is right."""
    with fuzz.folder() as folder:
        right = {
            "version": 1, "stage": 1, "selected": ["a", "b"], "logs": {"train.jsonl": 3},
            "settings": {"seed": 0, "n": [3]},
        }  # fmt: skip
        run: Any = SimpleNamespace(
            settings=lambda: right["settings"], ids={"a", "b", "c"}, live=None, folder=folder, newest={},
            log=SimpleNamespace(close=lambda: None, folder=folder),
            ranks=SimpleNamespace(agree=lambda work: work(), first=True),
        )  # fmt: skip
        run._rewind = lambda state: Stages._rewind(run, state)
        places = list(fuzz.ways(right))

        def one(rng: random.Random) -> str:
            (folder / "train.jsonl").write_text("{}\n")
            (folder / "stages.jsonl").write_text('{"stage": 0}\n{"stage": 1}\n')
            state = fuzz.changed(rng, copy.deepcopy(right), places)
            (folder / STATE).write_text(json.dumps(sealed(state) if isinstance(state, dict) else state))
            try:
                Stages.load(run, folder)
            except CropiError as error:
                text = str(error)
                assert len(text.encode()) < 2000 and (str(folder) in text or "selected prompts" in text), text
                return "words"
            assert run._known == state["stage"] and run._chosen == state["selected"]
            return "read"

        ends = fuzz.run(500, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["read"] > 20), ends


@pytest.mark.parametrize("name", ["/b", "../b", "a/b", "..", ""])
def test_a_checkpoint_names_logs_in_its_folder_alone(name: str, tmp_path: Path) -> None:
    with pytest.raises(CropiError, match=f"{tmp_path}: the checkpoint names the log '{name}'"):
        rewind(tmp_path, {name: 0})
