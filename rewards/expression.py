r"""Mathematical expressions: a grammar of ours for plain and LaTeX notation. It builds a tree; nothing is executed.

    parse("2x + \\frac12")   ->   ("+", ("*", ("num", 2.0), ("var", "x")), ("/", ("num", 1.0), ("num", 2.0)))

    expression   term {(+ | -) term}
    term         unary {(* | / | nothing) unary}          2x, 2(x+1) and x y are products
    unary        {+ | -} power
    power        primary {! | % | °} [^ unary]            to the right: 2^3^2 is 2^9
    primary      number | letter[_index] | constant | function argument | (expression) | |expression| | \frac a b | ...

Letters stand alone: xy is x times y. A number right behind a letter is its index: v0 is v_0. A word of four letters
that is no function makes the text unreadable: prose is no product of letters. Depth and length have limits.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, TypeAlias

Node: TypeAlias = tuple[Any, ...]  # (operator, operands ...)

MAX_CHARACTERS = 1000
MAX_DEPTH = 40  # of brackets, powers, roots and functions in one another
MAX_HEIGHT = 150  # of a tree: one of 150 terms is as high, and what walks it calls itself for each
MAX_DIGITS = 400
MAX_SINGLE_LETTERS = 3  # in a row, beside the names of functions and constants

_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan asin acos atan sinh cosh tanh exp ln lg log sqrt cbrt abs"
)
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
CONSTANTS = {"pi": "π", "infinity": "∞", "inf": "∞"}
_NAMES = sorted((*FUNCTIONS, *CONSTANTS, "binom", "frac"), key=len, reverse=True)
_LETTER_COMMANDS = ("ell", "hbar")  # the notation has Greek letters as such
_TOKEN = re.compile(
    r"(?P<number>(?:\d+(?:\.\d+)?|\.\d+|\d+\.(?!\d))(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<command>\\[A-Za-z]+)"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<letter>[α-ωΑ-Ω∞])"
    r"|(?P<symbol>\*\*|[-+*/:^_(){}\[\]!|%°√])"
    r"|(?P<space>\s+)"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,/]| ?/)")
_COMMA_DECIMAL = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,])")
_MIXED = re.compile(
    r"(?<![\d.^_}/])(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d)))(?![\d.])"
)
_RECURRING = re.compile(
    r"(?<![\d.])(\d{0,12})\.(\d{0,12})\\(?:overline|bar|dot)\s*\{\s*(\d{1,12})\s*\}(?:(\d{0,12})\\dot\s*\{\s*(\d)\s*\})?"
)
_CONTINUED = re.compile(r"(?<![\d.])(\d{0,12})\.(\d{0,12}?)(?:(\d)\3\3+|(\d{2,6})\4+)(?:\.{3}|\\l?dots|\\cdots)")
_OPENS = {"(": ")", "[": "]", "{": "}"}


class Unreadable(ValueError):
    """A text that is no expression of this grammar."""


@lru_cache(maxsize=8192)
def parse(text: str) -> Node:
    """Parse an expression in the notation of `rewards.notation`.

    Raises:
        Unreadable: It is none, or is too long or too deep.
    """
    if not text or len(text) > MAX_CHARACTERS:
        raise Unreadable("empty" if not text else "too long")
    text = _RECURRING.sub(_recurring, text)
    text = _CONTINUED.sub(_continued, text)
    text = _COMMA_DECIMAL.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    text = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)
    return _Parser(_tokens(_MIXED.sub(_mixed, text))).whole()


def variables(node: Node) -> frozenset[str]:
    """Return the names of the variables of a tree."""
    if node[0] == "var":
        return frozenset((node[1],))
    found: frozenset[str] = frozenset()
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= variables(part)
    return found


def _height(node: Node) -> int:
    """Return the number of nodes from the root of a tree to its farthest leaf."""
    height, level = 0, [node]
    while level:
        height += 1
        level = [part for parent in level for part in parent[1:] if isinstance(part, tuple)]
    return height


def _mixed(match: re.Match[str]) -> str:
    """Return "(1+1/2)" for "1 1/2", and the text as it is where the second part is no proper fraction."""
    whole, over, under = match[1], match[2] or match[4] or match[5], match[3] or match[6] or match[7]
    if max(map(len, (whole, over, under))) > 12 or int(over) >= int(under):
        return match[0]
    return f"({whole}+{over}/{under})"


def _recurring(match: re.Match[str]) -> str:
    r"""Return "(3/9)" for 0.\overline{3}, "(15/90)" for 0.1\dot{6}."""
    before, cycle = f"0{match[1]}{match[2]}", f"{match[3]}{match[4] or ''}{match[5] or ''}"
    return f"({int(before + cycle) - int(before)}/{(10 ** len(cycle) - 1) * 10 ** len(match[2])})"


def _continued(match: re.Match[str]) -> str:
    """Return "(3/9)" for 0.333..., "(15/90)" for 0.1666..., "(12/99)" for 0.1212..."""
    before, cycle = f"0{match[1]}{match[2]}", match[3] or match[4]
    return f"({int(before + cycle) - int(before)}/{(10 ** len(cycle) - 1) * 10 ** len(match[2])})"


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"the character {text[position]!r}")
        position = match.end()
        kind = str(match.lastgroup)
        if kind == "number" and len(match[0]) > MAX_DIGITS:
            raise Unreadable("too many digits")
        if kind == "number" and _is_index(match, tokens, text):
            tokens += [("symbol", "_"), (kind, match[0])]
        elif kind == "word":
            tokens += _letters(match[0])
        elif kind == "command" and match[0][1:] in FUNCTIONS | {"binom", "frac"}:
            tokens.append(("name", match[0][1:]))
        elif kind == "command":
            if match[0][1:] not in _LETTER_COMMANDS:
                raise Unreadable(f"the command {match[0]}")
            tokens.append(("letter", match[0][1:]))
        elif kind != "space":
            tokens.append((kind, match[0]))
    return tokens


def _is_index(match: re.Match[str], tokens: list[tuple[str, str]], text: str) -> bool:
    """Return whether a number stands right behind a letter, as in v0: it is an index then, not a factor."""
    behind_letter = bool(tokens) and tokens[-1][0] == "letter" and not text[match.start() - 1].isspace()
    constant = behind_letter and tokens[-1][1] in ("π", "e", "i", "∞")
    return behind_letter and not constant and len(match[0]) <= 2 and match[0].isdigit()


def _letters(word: str) -> list[tuple[str, str]]:
    """Return the names and single letters that a word is made of."""
    tokens: list[tuple[str, str]] = []
    position = single = 0
    while position < len(word):
        name = next((name for name in _NAMES if word.startswith(name, position)), None)
        if name is None:
            single += 1
            if single > MAX_SINGLE_LETTERS:
                raise Unreadable(f"the word {word!r}")
            tokens.append(("letter", word[position]))
            position += 1
        else:
            tokens.append(("letter", CONSTANTS[name]) if name in CONSTANTS else ("name", name))
            position += len(name)
    return tokens


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0
        self._bars = 0  # |...| that are open

    def whole(self) -> Node:
        node = self._expression()
        if self._at != len(self._tokens):
            raise Unreadable(f"{self._peek()[1]!r} is left over")
        if len(self._tokens) > MAX_HEIGHT and _height(node) > MAX_HEIGHT:
            raise Unreadable("too deep")
        return node

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def _take(self) -> tuple[str, str]:
        token = self._peek()
        self._at += 1
        return token

    def _accept(self, *symbols: str) -> str:
        kind, text = self._peek()
        if kind == "symbol" and text in symbols:
            self._at += 1
            return text
        return ""

    def _expect(self, symbol: str) -> None:
        if not self._accept(symbol):
            raise Unreadable(f"{symbol!r} is missing")

    def _expression(self) -> Node:
        node = self._term()
        while sign := self._accept("+", "-"):
            node = (sign, node, self._term())
        return node

    def _term(self) -> Node:
        node = self._unary()
        while True:
            if self._accept("*"):
                node = ("*", node, self._unary())
            elif self._accept("/", ":"):
                node = ("/", node, self._unary())
            elif self._begins_factor():
                if self._peek()[0] == "number" and self._tokens[self._at - 1][0] == "number":
                    raise Unreadable("two numbers in a row")
                node = ("*", node, self._power())
            else:
                return node

    def _begins_factor(self) -> bool:
        kind, text = self._peek()
        if kind == "symbol":
            return text in ("(", "{", "[", "√") or (text == "|" and not self._bars)
        return kind != "end"

    def _unary(self) -> Node:
        negative = False
        while sign := self._accept("+", "-"):
            negative ^= sign == "-"
        node = self._power()
        return ("neg", node) if negative else node

    def _power(self) -> Node:
        self._depth += 1  # whatever calls itself passes here
        if self._depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = self._primary()
        while mark := self._accept("!", "%", "°"):
            node = (mark, node)
        if self._accept("^", "**"):
            node = ("^", node, self._unary())
            while mark := self._accept("!", "%", "°"):
                node = (mark, node)
        self._depth -= 1
        return node

    def _primary(self) -> Node:
        kind, text = self._take()
        if kind == "number":
            return ("num", float(text))
        if kind == "letter":
            return self._letter(text)
        if kind == "name":
            return self._named(text)
        if text in _OPENS:
            bars, self._bars = self._bars, 0
            node = self._expression()
            self._expect(_OPENS[text])
            self._bars = bars
            return node
        if text == "|":
            self._bars += 1
            node = ("abs", self._expression())
            self._expect("|")
            self._bars -= 1
            return node
        if text == "√":
            return ("sqrt", self._power())
        raise Unreadable(f"{text!r} begins no term" if text else "it ends too early")

    def _letter(self, text: str) -> Node:
        if text in ("π", "e", "i", "∞") and self._peek() != ("symbol", "_"):
            return ("const", text)
        return ("var", f"{text}_{self._index()}" if self._accept("_") else text)

    def _index(self) -> str:
        """Return the index of a letter: one token, or all in braces."""
        if not self._accept("{"):
            return self._take()[1]
        parts = []
        while not self._accept("}"):
            kind, text = self._take()
            if kind == "end":
                raise Unreadable("'}' is missing")
            parts.append(text)
        return "".join(parts)

    def _named(self, name: str) -> Node:
        if name in ("frac", "binom"):
            return ("/" if name == "frac" else name, self._digit_or_group(), self._digit_or_group())
        if name == "sqrt" and self._accept("["):
            degree = self._expression()
            self._expect("]")
            return ("root", degree, self._power())
        if name == "sqrt":
            return ("sqrt", self._power())
        base: Node | None = None
        if name == "log" and self._accept("_"):
            base = self._digit_or_group()
        elif (
            name == "log"
            and self._peek()[0] == "number"
            and self._tokens[self._at + 1 : self._at + 2] == [("symbol", "(")]
        ):
            base = ("num", float(self._take()[1]))  # log2(8)
        power = self._unary() if self._accept("^", "**") else None
        argument = self._argument()
        node: Node = ("log", base, argument) if base else (name, argument)
        if power == ("neg", ("num", 1.0)) and f"arc{name}" in FUNCTIONS:
            return (f"arc{name}", argument)  # sin^{-1} x
        return ("^", node, power) if power else node

    def _argument(self) -> Node:
        """Return what a function is applied to: a group, or the factors up to the next sign or function."""
        if self._peek()[1] in ("(", "{", "["):
            return self._power() if self._peek()[1] != "(" else self._primary()
        node = self._unary()
        while self._begins_factor() and self._peek()[0] != "name" and self._peek()[1] not in ("(", "["):
            node = ("*", node, self._power())
        return node

    def _digit_or_group(self) -> Node:
        r"""Return an argument of \frac: a group, or one digit, as LaTeX reads \frac12."""
        kind, text = self._peek()
        if kind == "number" and len(text) > 1 and text.isdigit():
            self._tokens[self._at] = ("number", text[1:])
            return ("num", float(text[0]))
        return self._primary()
