r"""Prompts in the formats of other tools, converted to records of the domain `rl`.

    verl      {"prompt": [{"role": "user", "content": "<image>Find x."}], "images": [{"bytes": ..., "path": null}],
               "data_source": "hiyouga/geometry3k", "reward_model": {"style": "rule", "ground_truth": "7"},
               "ability": "math", "extra_info": {...}}
    GLM-V     {"prompt": "Find x.", "gt_answer": "<think>...</think><answer><|begin_of_box|>7<|end_of_box|></answer>",
               "datasource": "math", "image_file": "x.png"}
    others    {"question": "Find x.", "answer": "7", "image": "x.png"}        also problem, query, prompt; ground_truth

All become

    {"domain": "rl", "messages": [{"role": "user", "content": "<image>Find x."}], "images": ["x.png"],
     "reference": "7", "verifier": "math", "data_source": "hiyouga/geometry3k", "category": "math"}

and keep their other fields. The first two are recognised by their fields; others are taken for conversations unless the
user says that they are prompts. A field that would change what is asked, or how an answer is scored, and cannot be
obeyed, rejects the record: a reward model, an environment of tools, an instruction to write \boxed{}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.domains.rl_record import FOREIGN_REFERENCES, is_foreign_prompt, option_texts
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.records import chat_formats, chat_objects, chat_tools, chat_turns
from data_pipeline.inputs.records.prompt_values import file_of, is_set, parsed, reference_text, single
from data_pipeline.inputs.records.record_fields import OPTIONS, as_list, media_names, path_names

DOMAIN = "rl"
QUESTIONS = ("question", "problem", "query", "instruction", "prompt", "prompts")
REFERENCES = ("reference", "ground_truth", "gt_answer", "gt_answers", "answer", "solution")
_OF_GLM_V = FOREIGN_REFERENCES[1:]
_SOURCES = ("data_source", "datasource", "datasources")
# What a conversation's conversion reads of a prompt.
_CHAT_FIELDS = (
    *("messages", "system", "system_prompt", "thinking", "enable_thinking", *chat_tools.TOOLS, chat_objects.OBJECTS),
    *("images", "videos", "audio", "audios"),
)
# verl: keys of `extra_info` that say that tools or a simulated user answer in between, if they are true or not empty.
_ENVIRONMENTS = ("need_tools_kwargs", "interaction_kwargs")
_SINGLE_TURN = ("", "single_turn_agent")  # verl's `agent_name`


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options of an input kind that may hold prompts. A field is a column of a table.

    Raises:
        DataError: They contradict each other.
    """

    domain: str = ""  # of records that name none; empty: from the number of images and videos
    question: str = ""  # of prompts: field of the question, with dots for fields in fields: it replaces all messages
    reference: str = ""  # of prompts: field of the reference; empty: found by name
    verifier: str = ""  # of prompts that name none, and whose data source has none
    verifiers: tuple[str, ...] = ()  # the same by data source: SOURCE:VERIFIER each

    def __post_init__(self) -> None:
        if wrong := [entry for entry in self.verifiers if not all(entry.rpartition(":"))]:
            raise DataError(f"--set verifiers={wrong[0]}: write SOURCE:VERIFIER, such as hiyouga/geometry3k:math")
        if (given := self._of_prompts) and self.domain not in ("", DOMAIN):
            raise DataError(f"--set {given[0]} is for prompts, but --set domain={self.domain}: use domain={DOMAIN}")

    @property
    def default_domain(self) -> str:
        """The domain of records that name none; empty: from their fields. With options of prompts all are prompts."""
        return DOMAIN if self._of_prompts else self.domain

    @property
    def _of_prompts(self) -> list[str]:
        """The names of the options of prompts that are set."""
        return [name for name in ("question", "reference", "verifier", "verifiers") if getattr(self, name)]

    def verifier_of(self, source: str) -> str:
        """Return the verifier of the prompts of a data source; empty if there is none."""
        named = dict(entry.rpartition(":")[::2] for entry in self.verifiers)
        return named.get(source, self.verifier)


def is_prompt(record: dict[str, Any], domain: str = "") -> bool:
    """Return whether a record is a prompt.

    Args:
        record: The record.
        domain: Of records that name none; empty: found from their fields.
    """
    if record.get("domain") is not None or domain:
        return (record.get("domain") or domain) == DOMAIN
    return is_foreign_prompt(record)


def as_prompt(record: dict[str, Any], options: PromptOptions) -> tuple[dict[str, Any], dict[str, str], Counter[str]]:
    """Return a prompt with the fields of its domain, whose messages and files are still as they were given.

    Args:
        record: A prompt in one of the formats above.
        options: What the user says.

    Returns:
        The record; what became of its fields, as `Draft.read_as`; what of it is not read, as `Draft.not_read`.

    Raises:
        BadSample: bad_record, bad_reference, no_verifier, unsupported_reward, unsupported_environment or
            foreign_answer_form.
    """
    reader = _Reader(parsed(record), options)
    prompt = reader.prompt()
    return prompt, reader.read_as, reader.notes


def finish_prompt(
    record: dict[str, Any], media: dict[str, list[Media]] | None, notes: Counter[str]
) -> tuple[dict[str, Any], dict[str, list[Media]]]:
    """Convert the messages of a prompt of `as_prompt`.

    Args:
        record: The prompt.
        media: Its files. None: the record, or parts of its messages, name them.
        notes: Gets what is not read, by name.

    Returns:
        The record as it is stored, and the files in the order of their placeholders. If `media` is None: the record
        with paths under `images` and `videos`, and no files.

    Raises:
        BadSample: As chat_formats.normalise; foreign_answer_form.
    """
    chat = {name: value for name, value in record.items() if name in _CHAT_FIELDS}
    rest = {name: value for name, value in record.items() if name not in chat}
    files: dict[str, list[Media]] = {}
    if media is None:
        chat = chat_formats.normalise(chat, notes)
    else:
        chat, files = chat_formats.normalise_nameless(chat, media, notes)
    for turn in chat["messages"]:
        if "\\boxed" in turn["content"] and turn["role"] != "assistant":
            raise BadSample(
                "foreign_answer_form",
                r"it asks for \boxed{}, but this model marks answers with <|begin_of_box|>: name a field without this "
                "instruction, as --set question=extra_info.question",
            )
    return {**rest, **chat, "domain": DOMAIN}, files


def with_boxes(record: dict[str, Any], images: Sequence[Media]) -> dict[str, Any]:
    """Return a stored prompt with the marks of boxes written, see chat_objects.fill."""
    return chat_objects.fill(record, images)


def _options(options: Any) -> Any:
    option_texts(options)
    return options


def check_no_file_is_left(record: dict[str, Any]) -> None:
    """Check that a prompt whose files are found has no field that should hold some. Raises BadSample."""
    for field, option in OPTIONS.items():
        left = [name for name in (*media_names(record, field), *path_names(record, field)) if name != field]
        if named := [name for name in left if record[name]]:
            detail = f"{named[0]!r} is called like {field}, but is not read: --set {option}={named[0]}"
            raise BadSample("bad_record", f"{detail}, or rename it")


class _Reader:
    """Takes a record apart, and keeps account of its fields."""

    def __init__(self, record: dict[str, Any], options: PromptOptions) -> None:
        self.rest, self.options = dict(record), options
        self.read_as: dict[str, str] = {}
        self.notes: Counter[str] = Counter()

    def prompt(self) -> dict[str, Any]:
        self._check_environment()
        given: dict[str, Any] = {"messages": self._messages(), "reference": self._reference()}
        for field, names in (("data_source", _SOURCES), ("category", ("category", "ability"))):
            if (value := self._first(field, names, single)) is not None:
                given[field] = value
        if (options := self._first("settings", ("options", "choices"), _options)) is not None:
            settings = self.rest.pop("settings", None) or {}
            if not isinstance(settings, dict) or "options" in settings:
                raise BadSample("bad_record", "its options are given twice, or its settings are no object")
            given["settings"] = {"options": options, **settings}
        given["verifier"] = self._verifier(given.get("data_source", ""))
        for field, singular in OPTIONS.items():
            if field not in self.rest and singular in self.rest:
                self.read_as[f"field {singular}"] = field
                self.rest[field] = as_list(self.rest.pop(singular))
            if field in self.rest:
                self.rest[field] = [file_of(entry, self.notes) for entry in as_list(self.rest[field])]
        return {**self.rest, **given, "domain": DOMAIN}

    def _messages(self) -> list[Any]:
        """Return the turns of the prompt. The fields that it may have been are used up."""
        name = self.options.question
        if name:
            text = self._at(name, "question")
            for other in (*chat_turns.LISTS, *QUESTIONS):
                if self.rest.pop(other, None) is not None and other != name:
                    self.notes[f"field {other}"] += 1
        elif (listed := chat_turns.list_name(self.rest)) is not None:
            self.read_as[f"field {listed}"] = "messages"
            return self.rest.pop(listed)
        else:
            found = [name for name in QUESTIONS if self.rest.get(name) not in (None, "", [])]
            if len(found) > 1 and isinstance(self.rest.get("prompt"), list):
                found = ["prompt"]
            if len(found) != 1:
                problem = f"{' and '.join(found)} may be its question" if found else "it has no question"
                raise BadSample("bad_record", f"{problem}: name the field with --set question=FIELD")
            self.read_as[f"field {found[0]}"] = "messages"
            text = self.rest.pop(found[0])
        if isinstance(text, list) and text and all(isinstance(turn, dict) for turn in text):
            return text
        text = single(text)
        if not isinstance(text, str) or not text.strip():
            raise BadSample("bad_record", "its question is neither a text nor a list of messages")
        if text.startswith("[gMASK]"):
            raise BadSample("bad_record", "its question is written with the chat template already: give its text alone")
        return [{"role": "user", "content": text}]

    def _reference(self) -> str:
        name = self.options.reference
        reward = self.rest.pop("reward_model", None)
        if name and not name.startswith("reward_model."):
            value = self._at(name, "reference")
        elif reward is not None:
            value = self._ground_truth(reward, name.partition(".")[2] or "ground_truth")
        else:
            value = self._named_reference()
        return reference_text(value)

    def _ground_truth(self, reward: Any, key: str) -> Any:
        """Return the reference in verl's `reward_model`."""
        if not isinstance(reward, dict) or reward.get(key) is None:
            raise BadSample("bad_reference", f'"reward_model" has no {key}')
        style = reward.get("style") or "rule"
        if style != "rule":
            detail = (
                f'reward_model.style is {str(style)[:40]!r}: answers are scored by a rule here; write "rule" if one can'
            )
            raise BadSample("unsupported_reward", detail)
        self.read_as["field reward_model"] = "reference"
        self.notes.update(f"field reward_model.{other}" for other in reward.keys() - {key, "style"})
        return reward[key]

    def _named_reference(self) -> Any:
        found = [name for name in REFERENCES if self.rest.get(name) is not None]
        if of_glm_v := [name for name in found if name in _OF_GLM_V]:
            found = of_glm_v  # beside it, answers are those of a model
        elif len(found) > 1:
            found = [name for name in found if name != "solution"]  # an answer with its derivation
        if len(found) != 1:
            problem = f"{' and '.join(found)} may be its reference" if found else "it has no reference"
            raise BadSample("bad_reference", f"{problem}: name the field with --set reference=FIELD")
        [name] = found
        if name == "solution" and "<answer>" not in str(self.rest[name]):
            raise BadSample(
                "bad_reference", '"solution" may hold a derivation: --set reference=solution takes it whole'
            )
        if name != "reference":
            self.read_as[f"field {name}"] = "reference"
        return self.rest.pop(name)

    def _verifier(self, source: str) -> str:
        verifier, given = self.rest.pop("verifier", None), self.options.verifier_of(source)
        if isinstance(verifier, str) and verifier and given not in ("", verifier):
            self.notes[f"option verifier={given}, where a record says {verifier[:40]}"] += 1
        if not (verifier := verifier or given):
            of_source = f", or --set verifiers={source}:NAME for its data source" if source else ""
            raise BadSample("no_verifier", f"it names no verifier: --set verifier=NAME{of_source}")
        return verifier

    def _check_environment(self) -> None:
        extra = self.rest.get("extra_info")
        extra = extra if isinstance(extra, dict) else {}
        if named := [name for name in _ENVIRONMENTS if is_set(extra.get(name))]:
            detail = f"extra_info.{named[0]}: tools, or a simulated user, would answer in between"
            raise BadSample("unsupported_environment", f"{detail}, which is not supported")
        if (agent := self.rest.get("agent_name") or "") not in _SINGLE_TURN:
            raise BadSample(
                "unsupported_environment", f"agent_name is {str(agent)[:40]!r}: only single answers are trained"
            )

    def _first(self, field: str, names: Sequence[str], convert: Callable[[Any], Any]) -> Any:
        """Return the value of the first of some fields, which is used up; None if none has any."""
        for name in names:
            if self.rest.get(name) not in (None, "", [], {}):
                if name != field:
                    self.read_as[f"field {name}"] = field
                return convert(self.rest.pop(name))
        return None

    def _at(self, name: str, field: str) -> Any:
        """Return the value that the user has named: `answer`, `extra_info.question`."""
        value: Any = self.rest
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            raise BadSample("bad_record", f"it has no field {name!r}, which --set {field} names")
        if "." not in name:
            self.rest.pop(name)
        self.read_as[f"field {name}"] = {"question": "messages"}.get(field, field)
        return value
