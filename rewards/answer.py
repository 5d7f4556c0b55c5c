r"""Find the final answer in a response: exactly one box, where the model's form has it.

    glm45v   <think>thought</think>text                     thinking
    glm45v   text                                           thinking off: the prompt holds the empty thought
    glm41v   <think>thought</think><answer>text</answer>
    either   glm41v if the response has <answer>, else glm45v

    "<think>Seven dots.</think>There are <|begin_of_box|>7<|end_of_box|> dots."   ->   Extracted("7", ...)
    "<think>Seven dots.</think>There are 7 dots."                                 ->   Verdict(0.0, "no_box")

The box must be in the text; what the thought holds does not count. LaTeX's \boxed in the text is refused. Nothing is
guessed: a response that breaks the form scores 0, for one of REASONS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rewards.verdict import Verdict

Form = Literal["glm45v", "glm41v", "either"]
FORMS: tuple[str, ...] = get_args(Form)

BEGIN_BOX, END_BOX = "<|begin_of_box|>", "<|end_of_box|>"
_THINK, _END_THINK, _ANSWER, _END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
_TAGS = (_THINK, _END_THINK, _ANSWER, _END_ANSWER)
_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # tokens that end a turn

REASONS = {
    "bad_form": "tags are missing, repeated, in a wrong order, or those of another model; or text stands outside them",
    "cut_off": "the response ends inside the thought, the answer or a box",
    "no_box": "the text has no box",
    "two_boxes": "the text has several boxes: none is chosen",
    "nested": "a box in a box",
    "empty": "the box is empty",
    "latex_box": "the text has LaTeX's \\boxed",
}


@dataclass(frozen=True)
class Parts:
    """A response without its tags."""

    thought: str
    text: str


@dataclass(frozen=True)
class Extracted:
    """The final answer, and the parts of the response where it was found."""

    answer: str
    parts: Parts


def extract(response: str, form: Form = "either", thinking: bool = True) -> Extracted | Verdict:
    """Return the final answer of a response, or a score of 0 with one of REASONS.

    Args:
        response: What the model wrote, with its special tokens.
        form: The form of the model's responses.
        thinking: Whether the response must have a thought. Without, the thought may be absent or empty.
    """
    parts = split(response, form, thinking)
    if isinstance(parts, Verdict):
        return parts
    answer = boxed(parts.text)
    return answer if isinstance(answer, Verdict) else Extracted(answer, parts)


def split(response: str, form: Form = "either", thinking: bool = True) -> Parts | Verdict:
    """Return thought and text of a response, or a score of 0 with the reason `bad_form` or `cut_off`."""
    rest = _without_end(response.strip())
    if not rest.startswith(_THINK):
        thought = ""
        if thinking or _THINK in rest or _END_THINK in rest:
            return _refused("bad_form")
    else:
        thought, closed, rest = rest.removeprefix(_THINK).partition(_END_THINK)
        if _has_tag(thought):
            return _refused("bad_form")
        if not closed:
            return _refused("cut_off")
        if not thinking and thought.strip():
            return _refused("bad_form")
    text = _text(rest.strip(), form)
    return text if isinstance(text, Verdict) else Parts(thought.strip(), text)


def has_box(text: str) -> bool:
    """Return whether a text has a token of a box."""
    return BEGIN_BOX in text or END_BOX in text


def _text(rest: str, form: Form) -> str | Verdict:
    """Return the text of what follows the thought."""
    if form == "glm41v" or (form == "either" and _ANSWER in rest):
        if not rest.startswith(_ANSWER):
            return _refused("bad_form")
        inner, closed, after = rest.removeprefix(_ANSWER).partition(_END_ANSWER)
        if not closed and not _has_tag(inner):
            return _refused("cut_off")
        if after:
            return _refused("bad_form")
        rest = inner
    return _refused("bad_form") if _has_tag(rest) else rest.strip()


def boxed(text: str) -> str | Verdict:
    """Return what the only box of a text holds, or a score of 0 with one of REASONS."""
    if "\\boxed" in text:
        return _refused("latex_box")
    before, begun, rest = text.partition(BEGIN_BOX)
    if END_BOX in before:
        return _refused("bad_form")
    if not begun:
        return _refused("no_box")
    inner, closed, after = rest.partition(END_BOX)
    if BEGIN_BOX in inner:
        return _refused("nested")
    if not closed:
        return _refused("cut_off")
    if has_box(after):
        return _refused("two_boxes" if BEGIN_BOX in after else "bad_form")
    return inner.strip() or _refused("empty")


def _without_end(response: str) -> str:
    for end in _ENDS:
        if response.endswith(end):
            return response.removesuffix(end).rstrip()
    return response


def _has_tag(text: str) -> bool:
    return any(tag in text for tag in _TAGS)


def _refused(reason: str) -> Verdict:
    assert reason in REASONS
    return Verdict(0.0, reason)
