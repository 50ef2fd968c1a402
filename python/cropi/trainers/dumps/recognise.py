"""Which program wrote a file, by its content: trajectory records, prompts alone, a trainer's or an engine's dump."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cropi.data.forms import dotted_names, form_of, is_prompt
from cropi.data.readers import first_row
from cropi.data.tables import is_saved
from cropi.errors import CropiError, RecordError
from cropi.files import open_to_read
from cropi.trainers.dumps.fields import names

RECORDS = "records"


@dataclass(frozen=True)
class Source:
    """A program whose files are read.

    Attributes:
        words: what its files are called.
        keys: those that a row has together, one of several layouts each.
        reader: the module whose ``read_dump`` reads them; "": rows of text (:mod:`cropi.trainers.dumps.text_rows`).
        pickled: whether there are pickles among them.
        columns: whether the reader looks at the columns that a user names.
    """

    words: str
    keys: tuple[str, ...] = ()
    reader: str = ""
    pickled: bool = False
    columns: bool = False


# A row is of the first source that has its keys.
SOURCES = {
    RECORDS: Source("trajectory records", columns=True),
    "vllm": Source("outputs of vLLM", ("request_id outputs", "prompt_token_ids outputs"), "vllm", pickled=True),
    "nemo-rl": Source("training data of NeMo-RL", ("token_ids token_loss_mask rewards",), "nemo_rl"),
    "verl": Source("rollouts of verl", ("input output score step",), "verl", pickled=True, columns=True),
    "skyrl": Source("results of SkyRL", ("input_prompt output_response score",)),
    "areal": Source("a rollout dump of AReaL", ("task_id head_version prompt completion",)),
    "prime-rl": Source(
        "rollouts of prime-rl (verifiers)", ("example_id prompt completion", "task nodes", "task traces"), "verifiers"
    ),
    "trl": Source("completions of TRL", ("step prompt completion advantage",), "trl", columns=True),
    "ms-swift": Source(
        "completions of ms-swift", ("step prompt completion advantages", "gen_step prompt completion"), "swift",
        columns=True,
    ),
    "openrlhf": Source("batch inference of OpenRLHF", ("input output reward",)),
    "nemo-gym": Source("rollouts of NeMo-Gym", ("responses_create_params response reward",), "nemo_gym"),
    "open-instruct": Source(
        "rollouts of open-instruct", ("prompt_tokens response_tokens reward",), "open_instruct"
    ),
    "atropos": Source("groups of Atropos", ("tokens masks scores",), "atropos"),
    "roll": Source("rollouts of ROLL", ("global_step responses scores sampling_params",), "roll"),
    "art": Source("trajectories of ART", ("group_index trajectory_index trajectory_json",), "art"),
    "slime": Source("a rollout dump of slime", reader="slime", pickled=True, columns=True),
    "openai": Source("chat completions", reader="openai"),
}  # fmt: skip
# Of these keys, those that a sample without a reward leaves empty.
SCORES = {"reward", "rewards", "score", "scores"}
# Enough of a pickle to have met the keys of its outermost table and the first class.
MOST_OPCODES = 20_000
# Keys of rLLM's episodes, of which the first is among the first of the file.
EPISODE = ("episode_id", "trajectories")
# Keys of a record's responses.
ANSWERED = {"responses", "completions", "response_ids", "rewards", "response", "completion"}
# Rows that trainers write beside, or in place of, their rollouts: keys that they have together, and what they lack.
LACKING: list[tuple[tuple[str, ...], str]] = [
    (
        EPISODE,
        "an episode of rLLM, which holds chats as text, step by step, and no tokens; have the workflow write",
    ),
    (
        ("schema_version", "group_idx", "traj_idx", "total_reward"),
        "a summary of a rollout of tinker-cookbook, which holds lengths and rewards, and neither text nor tokens; have "
        "the environment write",
    ),
    (
        ("kind", "prompt_tokens", "samples"),
        "a sample that tinker-cookbook captured, which holds tokens and log-probs, and no rewards; have the "
        "environment write",
    ),
]
_ROLL = "`cropi rollout` samples and scores responses to them; then give its file"


def recognise(path: str | Path, *, renamed: bool = False) -> str:
    """What wrote a file, one of :data:`SOURCES`; ``renamed``: its columns have names of their own, so that they are not
    judged.

    Raises:
        CropiError: it holds prompts alone, is a dump that cannot be read, or a file of an unknown kind; the message
            says which, and what to do.
    """
    path = Path(path)
    if is_saved(path) or not os.path.isfile(path):
        return RECORDS  # whose reader says what is wrong
    with open_to_read(path) as file:
        head = file.read(16)
        if head.startswith(b"PK\x03\x04"):
            return _of_strings(path, _strings_of_zip(path))
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            file.seek(0)
            return _of_strings(path, _strings(file))
    if path.suffix == ".bin" and head and (head[0] >> 4 == 9 or head[0] in (0xDC, 0xDD)):
        raise CropiError(
            f"{path} is a packed batch of prime-rl (msgpack), which holds no prompt ids, and whose fields change their "
            "order from release to release; give the rollouts that it saves beside it, train_rollouts.jsonl"
        )
    try:
        where, row = first_row(path)
    except RecordError:
        if _begins_episode(path):
            raise _lacking(path, LACKING[0][1]) from None
        return RECORDS  # the error comes again, when the record is read
    return source_of_row(row, where, renamed=renamed)


def source_of_row(row: Mapping[str, Any], where: str, *, renamed: bool = False) -> str:
    """What wrote a row.

    Raises:
        CropiError: it holds a prompt alone.
    """
    held = {key for key, value in row.items() if value is not None}
    for name, source in SOURCES.items():
        for wanted in map(set, map(str.split, source.keys)):
            if row.keys() >= wanted and wanted - held <= SCORES:
                return name
    if "group_index" in held and _says_who_spoke(row.get("messages")):
        return "art"
    if "choices" in held or _answer(row.get("response")):
        return "openai"
    if renamed:
        return RECORDS
    for keys, words in LACKING:
        if row.keys() >= set(keys) and not held & ANSWERED:  # a record may keep such columns as its own
            raise _lacking(where, words)
    if {"custom_id", "body"} <= held:
        raise CropiError(
            f"{where}: this is the input of a batch of requests, without answers; run the batch, score the answers, "
            f"and give its output (and this file as --dataset of `cropi convert`); or {_ROLL}"
        )
    if {"prompt", "reward_model"} <= held and not held & {"responses", "rewards", "response_ids"}:
        raise CropiError(
            f"{where}: these are prompts of verl (data_source, prompt, reward_model), without responses; {_ROLL}"
        )
    if is_prompt(row):
        kind = "of slime or OpenRLHF " if "label" in held else ""
        raise CropiError(
            f"{where}: these are prompts {kind}without responses (the row has {names(row)}), and selection needs "
            f"several scored responses of your policy to each; {_ROLL}{dotted_names(row)}"
        )
    form_of(row, where, rewards=None)  # says what is missing; the reader, whether there must be rewards
    return RECORDS


def _begins_episode(path: Path) -> bool:
    """Whether an object over several lines begins as an episode of rLLM."""
    with open_to_read(path) as file:
        return re.match(rb'\s*{\s*"[^{}\[\]]*"%s":' % EPISODE[0].encode(), file.read(4096)) is not None


def _lacking(where: object, words: str) -> CropiError:
    return CropiError(f"{where} is {words} trajectory records (docs/trajectories.md)")


def _says_who_spoke(messages: Any) -> bool:
    """Whether ART 0.5 wrote them: most of its other columns may be empty."""
    return isinstance(messages, list) and any(isinstance(m, Mapping) and "trainable" in m for m in messages)


def _answer(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    body = value.get("body")
    return "choices" in value or "status_code" in value or (isinstance(body, Mapping) and "choices" in body)


def _of_strings(path: Path, strings: set[str]) -> str:
    """By the keys and classes that a pickle names."""
    if {"rollout_id", "samples"} <= strings:
        return "slime"
    if {"tensordict", "global_steps"} <= strings or any(
        name.startswith(("verl", "tensordict."))
        for name in strings  # its last key may be far behind
    ):
        return "verl"
    if any(name.startswith("vllm") for name in strings) or {"prompt_token_ids", "outputs"} <= strings:
        return "vllm"
    if {"rollout_id", "rollout_data", "rank"} <= strings:
        raise CropiError(
            f"{path} is what one rank of slime trained on, which holds no prompt ids, and rewards that are normalised "
            "already; give the rollouts beside it (rollout_data/ of --dump-details)"
        )
    if any("TrainingInputBatch" in name or name.startswith("skyrl") for name in strings):
        raise CropiError(
            f"{path} is a training batch of SkyRL, which holds no prompt ids and, once advantages are made, no "
            "rewards; give the results that trainer.dump_eval_results writes ({data_source}.jsonl)"
        )
    raise CropiError(
        f"{path} is a pickle, but none of slime, verl or vLLM (it names {names(sorted(strings)[:12])}); write the "
        "records as JSON lines or parquet (docs/trajectories.md)"
    )


def _strings_of_zip(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"), None)
            if name is None:
                raise CropiError(
                    f"{path} is a zip archive that torch.save did not write (a numpy or other archive); unpack it, and "
                    "write the records as JSON lines or parquet (docs/trajectories.md)"
                )
            with archive.open(name) as file:
                return _strings(file)
    except zipfile.BadZipFile as error:
        raise CropiError(f"{path} is a damaged zip archive ({error}); copy it again") from error


def _strings(file: IO[bytes]) -> set[str]:
    """The texts that a pickle's first instructions hold; nothing of it is run."""
    strings: set[str] = set()
    try:
        for number, (code, value, _) in enumerate(pickletools.genops(file)):
            if isinstance(value, str):
                strings.add(value.replace(" ", ".") if code.name == "GLOBAL" else value)
            if number > MOST_OPCODES:
                break
    except Exception:  # damaged: whoever reads it says how
        pass
    return strings
