"""Chemical formulas and equations, in the notation of `rewards.notation`.

substance("2H_{2}O(l)")              Substance(coefficient 2, {H: 2, O: 1}, charge 0, state l)
reaction("2H2 + O2 → 2H2O")          ((2 H2, O2), (2 H2O))
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir "
    "Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl "
    "Mc Lv Ts Og"
)
ELEMENTS = frozenset(_SYMBOLS.split())
_MAX_CHARACTERS = 300
_MAX_COUNT = 10_000
_MAX_DEPTH = 6

_STATE = re.compile(r"\s*\(\s*(s|l|g|aq)\s*\)\s*$|\s*_\{?\(?(s|l|g|aq)\)?\}?\s*$")
_COEFFICIENT = re.compile(r"^\s*(\d{1,4}(?:/\d{1,3}|\.\d{1,3})?|\\frac\{?\d\}?\{?\d\}?)\s*(?=[A-Z(\[e])")
_CHARGE = re.compile(r"\^\s*\{?\s*(?:(\d{0,2})\s*([+-])|([+-])\s*(\d{1,2}))\s*\}?$")
_PLAIN_CHARGE = re.compile(r"(\d*)([+-])$")
_TOKEN = re.compile(r"(?P<element>[A-Z][a-z]?)|(?P<open>[(\[])|(?P<close>[)\]])|(?P<count>_?\{?(\d{1,4})\}?)")
_ARROW = re.compile(r"\s*(?:-{1,3}>|={1,3}>|<=+>|<-+>|[→⟶⇌⇋⇄↔⟷⇒=]|⟹)\s*(?:\{[^{}]*\}|\[[^\[\]]*\])?\s*")
_PLUS = re.compile(r"\s+\+\s+|(?<![\^{\s])\s*\+(?!\s*\((?:s|l|g|aq)\))\s*(?=[\dA-Z(\[]|e\^?-|\\frac)(?![^{}]*\})")
_WORDS = {"light": "light", "光": "light", "hν": "light", "electricity": "electricity", "电": "electricity"}
_WORD = re.compile(r"heat|energy|light|electricity|热量?|能量?|光|电|hν|ΔH?")
_BOND = re.compile(r"(?<=[A-Za-z\d)])[=≡](?=[A-Z(])")
_OXIDATION = re.compile(r"\((?:IV|VI{0,2}|I{1,3})\)")  # the name Fe(III), not iron and three iodine
_GROUPS = re.compile(r"COOH|CO2H|CHO|OH|NH2")


@dataclass(frozen=True)
class Substance:
    """One term: a coefficient, element counts, a charge, and a state if it is given."""

    coefficient: Fraction
    counts: frozenset[tuple[str, int]]
    charge: int
    state: str
    # functional groups that a condensed formula shows, sorted; isomers differ in them
    groups: tuple[str, ...] | None = None

    @property
    def word(self) -> bool:
        """Whether it is a word of an equation, such as "energy"."""
        return any(name.islower() and len(name) > 1 for name, _ in self.counts)

    def same(self, other: Substance) -> bool:
        """Return whether both are the same: a state counts only where both have one."""
        states = not (self.state and other.state) or self.state == other.state
        ours = (self.coefficient, self.counts, self.charge)
        return states and ours == (other.coefficient, other.counts, other.charge)


@lru_cache(maxsize=4096)
def substance(text: str) -> Substance | None:
    """Return the substance that a text names by its formula, or None."""
    if not text or len(text) > _MAX_CHARACTERS or _OXIDATION.search(text):
        return None
    text = re.sub(r"[↑↓]", "", text).strip()
    state = ""
    if found := _STATE.search(text):
        state, text = found[1] or found[2], text[: found.start()]
    coefficient = Fraction(1)
    if found := _COEFFICIENT.match(text):
        coefficient, text = _fraction(found[1]), text[found.end() :]
    charge, text = _charge(text.replace(" ", ""))
    if text == "e":
        return Substance(coefficient, frozenset((("e", 1),)), -1, state, None) if charge in (0, -1) else None
    counts: Counter[str] = Counter()
    plain = _BOND.sub("", text)
    for number, part in enumerate(re.split(r"[*.]", plain)):  # CuSO4·5H2O
        times = re.match(r"\d{1,3}", part) if number else None
        counted = _count(part[times.end() :] if times else part)
        if counted is None:
            return None
        for element, count in counted.items():
            counts[element] += count * (int(times[0]) if times else 1)
    condensed = len(re.findall(r"C(?![a-z])", plain)) > 1 or plain.count("H") > 1
    groups = tuple(sorted(_GROUPS.findall(re.sub("[_{}]", "", plain)))) if condensed else None
    return Substance(coefficient, frozenset(counts.items()), charge, state, groups)


@lru_cache(maxsize=4096)
def reaction(text: str) -> tuple[tuple[Substance, ...], tuple[Substance, ...]] | None:
    """Return both sides of an equation, or None."""
    if len(text) > _MAX_CHARACTERS or (_BOND.search(text) and "+" not in text):
        return None
    halves = _ARROW.split(text)
    if len(halves) != 2:
        return None
    sides = []
    for half in halves:
        terms = [_term(term.strip()) for term in _PLUS.split(half.strip())]
        found = [term for term in terms if term is not None]
        if not found or len(found) != len(terms):
            return None
        sides.append(tuple(found))
    return sides[0], sides[1]


def _term(text: str) -> Substance | None:
    """Return a substance, or a word such as "energy", which must be on the same side of the other equation."""
    if word := _WORD.fullmatch(text):
        return Substance(Fraction(1), frozenset(((_WORDS.get(word[0], "heat"), 1),)), 0, "")
    return substance(text)


def same_reaction(given: tuple[tuple[Substance, ...], ...], wanted: tuple[tuple[Substance, ...], ...]) -> bool:
    """Return whether two equations are the same up to order on a side, the form of the arrow, and a common factor."""
    first, second = (
        sum((term.coefficient for term in side[0] if not term.word), start=Fraction(0)) for side in (given, wanted)
    )
    factor = second / first if first and second else Fraction(1)
    return all(_same_side(one, other, factor) for one, other in zip(given, wanted, strict=True))


def _same_side(one: tuple[Substance, ...], other: tuple[Substance, ...], factor: Fraction) -> bool:
    left = list(other)
    for term in one:
        scaled = term if term.word else replace(term, coefficient=term.coefficient * factor)
        match = next((number for number, candidate in enumerate(left) if scaled.same(candidate)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _fraction(text: str) -> Fraction:
    if text.startswith("\\frac"):
        over, under = re.findall(r"\d", text)
        return Fraction(int(over), int(under) or 1)
    over, _, under = text.partition("/")
    return Fraction(over) / (int(under or 1) or 1)


def _charge(text: str) -> tuple[int, str]:
    """Return (charge, the formula without it): of SO4^{2-}, SO42-, Fe3+, NH4+."""
    if found := _CHARGE.search(text):
        sign, digits = found[2] or found[3], found[1] or found[4] or "1"
        return int(digits) * (1 if sign == "+" else -1), text[: found.start()]
    if not (found := _PLAIN_CHARGE.search(text)):
        return 0, text
    digits, body = found[1], text[: found.start()]
    sign = 1 if found[2] == "+" else -1
    alone = re.fullmatch(r"[A-Z][a-z]?|\[.*\]", body) is not None
    if len(digits) > 1 or (digits and alone):  # SO42-, Fe3+
        return sign * int(digits[-1]), body + digits[:-1]
    return sign, body + digits


def _count(text: str) -> Counter[str] | None:
    """Return the number of atoms of each element, or None if a text is no formula."""
    stack: list[Counter[str]] = [Counter()]
    last: Counter[str] | None = None  # what a count would multiply
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match["element"]:
            name = match["element"] if match["element"] in ELEMENTS else match["element"][0]
            if name not in ELEMENTS:
                return None
            position = match.start() + len(name)
            last = Counter({name: 1})
            stack[-1] += last
        elif match["open"]:
            stack.append(Counter())
            last = None
            if len(stack) > _MAX_DEPTH:
                return None
        elif match["close"]:
            if len(stack) < 2:
                return None
            last = stack.pop()
            stack[-1] += last
        else:
            times = int(match[5])
            if last is None or not 0 < times <= _MAX_COUNT:
                return None
            for element, count in last.items():
                stack[-1][element] += count * (times - 1)
            last = None
    return stack[0] if len(stack) == 1 and stack[0] else None
