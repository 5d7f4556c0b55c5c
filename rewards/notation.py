r"""One notation for answers in mathematics: LaTeX, Unicode and plain text become the same characters.

$\dfrac{3}{4}$        \frac{3}{4}            x²     x^{2}
72^{\circ}            72°                    1½     1 1/2
−5 × 10³              -5 * 10^{3}            \{1, 2\}  ⦃1, 2⦄
1.5x10^3              1.5*10^3               \theta    θ
\text{7 cm}           7 cm                   １５   15
**7**, \boxed{7}      7                      根号2  √2
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rewards.plain_text import has_many_marks

MAX_CHARACTERS = 5000  # of an answer that is looked at: longer ones are refused

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_UP = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_DOWN = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile(r"([¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‒‐‑﹣－", "-"),
        **dict.fromkeys("×⋅·∙•∗", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("≤⩽≦", "≤"),
        **dict.fromkeys("≥⩾≧", "≥"),
        **dict.fromkeys("˚º", "°"),
        **dict.fromkeys("，、", ","),
        **dict.fromkeys("\u00a0\u2009\u202f\u2007\u200a", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        "；": ";",
        "：": ":",
        "（": "(",
        "）": ")",
        "。": ".",
        "µ": "μ",
        "∛": "\\sqrt[3] ",
        "∜": "\\sqrt[4] ",
    }
)

_GREEK_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
_GREEK_LETTERS = "αβγδεεζηθθικλμνξπρστυφφχψωΓΔΘΛΞΠΣΦΨΩ"
_COMMANDS = {
    **dict.fromkeys(("left", "right", "displaystyle", "textstyle", "big", "Big", "bigl", "bigr", "limits"), ""),
    **dict.fromkeys(("quad", "qquad", "thinspace", "space"), " "),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac "),
    **dict.fromkeys(("cdot", "times", "ast"), "*"),
    **dict.fromkeys(("dbinom", "tbinom"), r"\binom "),
    **dict.fromkeys(("le", "leq", "leqslant"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("lbrace", "lbrack"), "⦃"),
    **dict.fromkeys(("rbrace", "rbrack"), "⦄"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("approx", "simeq", "thickapprox"), "≈"),
    **dict.fromkeys(("rightarrow", "to", "longrightarrow", "xrightarrow"), "→"),
    **dict.fromkeys(("lor", "vee"), " or "),
    **dict.fromkeys(("land", "wedge"), " and "),
    **dict.fromkeys(("rightleftharpoons", "leftrightarrow"), "⇌"),
    "div": "/",
    "lt": "<",
    "gt": ">",
    "pm": "±",
    "mp": "∓",
    "infty": "∞",
    **dict(zip(_GREEK_NAMES.split(), _GREEK_LETTERS, strict=True)),
    "degree": "°",
    "circ": "°",
    "cup": "∪",
    "in": "∈",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "mid": "|",
}
_FONT = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|mathcal|operatorname|mbox|rm|ce|boldsymbol|boxed|fbox)"
    r"\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
_REALS = re.compile(r"\\(?:mathbb|mathbf)\s*\{?R\}?|ℝ")
_COMMAND = re.compile(r"\\([A-Za-z]+) ?")
_SPACES = re.compile(r"\\[,;:! ]|\s+")
_DEGREES = re.compile(r"\^\s*(?:\{\s*°\s*\}|°)")
_DOLLARS = re.compile(r"^\s*(?:\$\$?(?!\s*\d[\d.,]*\s*$)|\\\(|\\\[)(.*?)(?:\$\$?|\\\)|\\\])\s*\.?\s*$", re.DOTALL)
_PERCENT = re.compile(r"(?<=\d)\s*(?:percent|per cent)\b", re.IGNORECASE)
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_EMPHASIS = re.compile(r"(\*\*|__|`)([^*_`]+)\1[.。]?")  # Markdown's marks around all of an answer
_PLAIN = re.compile(r"[-+\w ().,/=]*", re.ASCII)


@lru_cache(maxsize=8192)
def tidy(text: str) -> str:
    """Return a text in the notation of this module, without white space and full stops at its ends."""
    text = " ".join(text.split())  # first of all: no pattern then sees long runs of spaces
    if emphasis := _EMPHASIS.fullmatch(text):
        text = emphasis[2].strip()
    if has_many_marks(text):
        return text  # no answer in mathematics; Unicode's normal forms would take minutes
    if not _PLAIN.fullmatch(text):
        text = _TIMES_TEN.sub("*", _without_latex(_without_unicode(text)))
    text = _PERCENT.sub("%", " ".join(text.split()))
    bare = text.rstrip(" .;,")
    return bare if bare and ".." not in text[len(bare) :] else text  # "1, 2, ..." is not "1, 2"


def _without_unicode(text: str) -> str:
    text = text.translate(_CHARACTERS).replace("根号", "√")
    text = _REALS.sub("\ue000", text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[1]).replace("\u2044", "/"), text)
    text = _UP.sub(lambda match: "^{" + "".join(map(_SUPERSCRIPTS.__getitem__, match[0])) + "}", text)
    text = _DOWN.sub(lambda match: "_{" + "".join(map(_SUBSCRIPTS.__getitem__, match[0])) + "}", text)
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS).replace("\ue000", "ℝ")


def _without_latex(text: str) -> str:
    if "\\" in text or "$" in text:
        if wrapped := _DOLLARS.match(text):
            text = wrapped[1]
        text = text.replace("~", " ").replace("\\{", "⦃").replace("\\}", "⦄").replace("\\%", "%").replace("\\$", "$")
        for _ in range(3):  # fonts in fonts
            text = _FONT.sub(r" \1 ", text)
        text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text)
    return _DEGREES.sub("°", _SPACES.sub(" ", text.replace("{,}", ",")))
