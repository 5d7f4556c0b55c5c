"""Physics and chemistry: quantities, laws, formulas, equations; each rule in both directions."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from scipy import constants

from rewards.formulas import reaction, substance
from rewards.quantity import read
from tests.rewards.judging import score

pytestmark = pytest.mark.fast

PHYSICS = [
    ("12 metres", "12 m", 1),
    ("1200 cm", "12 m", 1),
    ("5 cm", "5 m", 0),
    ("5 N", "5 J", 0),
    ("5 Nm", "5 J", 1),
    ("5 J/s", "5 W", 1),
    ("3 kg m/s^2", "3 N", 1),
    ("3 kg·m/s", "3 N·s", 1),
    ("3 J/(kg·K)", "3 J/kg/K", 1),
    ("1 kWh", "3.6 MJ", 1),
    ("10 kΩ", "10000 ohm", 1),
    ("20 μF", "20 uF", 1),
    ("5 \\mathrm{~m} / \\mathrm{s}", "5 m/s", 1),
    ("5 m s^{-1}", "5 m/s", 1),
    ("100 km per hour", "100 km/h", 1),
    ("5 s^{-1}", "5 Hz", 1),
    ("5 m s-1", "5 m/s", 1),
    ("5\\,\\mathrm{m\\,s^{-2}}", "5 m/s^2", 1),
    ("5 \\frac{\\text{m}}{\\text{s}^2}", "5 m/s^2", 1),
    ("3 amps", "3 A", 1),
    ("2 square meters", "20000 cm²", 1),
    ("60 min", "1 h", 1),
    ("5 米/秒", "5 m/s", 1),
    ("15 ℃", "288.15 K", 1),
    ("59 °F", "15 °C", 1),
    ("15 °C", "15 K", 0),
    ("v = 3 m/s", "3 m/s", 1),
    ("3", "v = 3", 1),
    ("9.81 m/s^2", "9.8 m/s^2", 0),
    ("12.00001 m", "12 m", 1),
    ("-5 m", "5 m", 0),
    ("12 m/s", "12 m/s^2", 0),
    ("1 nm", "0 m", 0),
    ("13", "12 m", 0),
    ("13 m", "12", 0),
    ("12", "12 m", None),
    ("12 m", "12", None),
    ("10 N upward", "10 N", None),
    ("about 12 m", "12 m", 0),
    ("12 m or 13 m", "12 m", 0),
    ("12-13 m", "12 m", 0),
    ("m=E/c^2", "E=mc^2", 1),
    ("c=\\sqrt{E/m}", "E=mc^2", 1),
    ("P=\\frac{nRT}{V}", "PV=nRT", 1),
    ("f=\\frac{uv}{u+v}", "\\frac1f=\\frac1u+\\frac1v", 1),
    ("g=4\\pi^2 l/T^2", "T=2\\pi\\sqrt{l/g}", 1),
    ("E=mc", "E=mc^2", 0),
    ("-F=ma", "F=ma", 0),
    ("mv^2/2", "\\frac{1}{2}mv^2", 1),
    ("mv^2", "\\frac{1}{2}mv^2", 0),
    ("upward", "downward", None),
    ("twelve metres", "12 m", 1),
    ("two metres", "12 m", 0),
    ("one hour", "3600 s", 1),
    ("twelve", "12 m", None),
    ("π/6", "30°", 1),
    ("30°", "30", None),
    ("mg\\sin\\theta", "mg sin θ", 1),
    ("\\lambda = 500 nm", "500 nm", 1),
    ("\\Delta t = 4 s", "3 s", 0),
    ("A", "B", 0),
]
CHEMISTRY = [
    ("CH₄", "CH4", 1),
    ("\\ce{H2O}", "H2O", 1),
    ("$\\mathrm{H_2O}$", "H2O", 1),
    ("h2o", "H2O", None),
    ("HO2", "H2O", 0),
    ("2H2O", "H2O", 0),
    ("Ca(OH)_2", "Ca(OH)2", 1),
    ("CaO2H2", "Ca(OH)2", 1),
    ("CuSO4·5H2O", "CuSO4.5H2O", 1),
    ("CuSO4", "CuSO4·5H2O", 0),
    ("C2H5OH", "CH3CH2OH", 1),
    ("C2H6O", "C2H5OH", 1),
    ("CH2=CH2", "C2H4", 1),
    ("CH3OCH3", "C2H5OH", None),
    ("Fe^{3+}", "Fe3+", 1),
    ("Fe^{2+}", "Fe^{3+}", 0),
    ("SO4^2-", "SO₄²⁻", 1),
    ("SO42-", "SO₄²⁻", 1),
    ("MnO4-", "MnO_4^-", 1),
    ("OH", "OH⁻", 0),
    ("CO2", "CO2(g)", 1),
    ("NaCl(aq)", "NaCl(s)", 0),
    ("2H2 + O2 -> 2H2O", "2H2 + O2 → 2H2O", 1),
    ("2H2+O2=2H2O", "2H2 + O2 → 2H2O", 1),
    ("2H2(g) + O2(g) ⇌ 2H2O(l)", "O2 + 2H2 \\rightarrow 2H2O", 1),
    ("H2 + O2 → H2O", "2H2 + O2 → 2H2O", 0),
    ("2H2O → 2H2 + O2", "2H2 + O2 → 2H2O", 0),
    ("2H2 + O2 → 2H2O + O2", "2H2 + O2 → 2H2O", 0),
    ("Cl- + Na+ → NaCl", "Na+ + Cl- → NaCl", 1),
    ("Ag+ + Cl- → AgCl(s)", "Ag+(aq) + Cl-(aq) → AgCl(s)", 1),
    ("Ag+(aq)+Cl-(aq)=AgCl(s)", "Ag^+ + Cl^- → AgCl", 1),
    ("Ag+(s) + Cl-(aq) → AgCl(s)", "Ag+(aq) + Cl-(aq) → AgCl(s)", 0),
    ("Fe(III)", "Fe3+", None),
    ("Zn^{2+} + 2e^- → Zn", "Zn2+ + 2e- → Zn", 1),
    ("Fe + 2HCl = FeCl2 + H2↑", "Fe + 2HCl → FeCl2 + H2", 1),
    ("[Cu(NH3)4]2+", "[Cu(NH_3)_4]^{2+}", 1),
    ("-393.5 kJ mol-1", "-393.5 kJ/mol", 1),
    ("sp3", "sp^3", 1),
    ("sp2", "sp^3", 0),
    ("1s2 2s2", "1s^2 2s^2", 1),
    ("1s^{2}2s^{2}2p^{6}", "1s² 2s² 2p⁶", 1),
    ("1s2 2s1", "1s^2 2s^2", None),
    ("10^3 g", "103 g", 0),
    ("water", "H2O", None),
    ("3", "H2O", 0),
    ("pH = 7.0", "7", 1),
    ("7", "pH = 7", 1),
    ("pH=8", "pH = 7", 0),
    ("pOH = 7", "pH = 7", 0),
    ("100 mmol/L", "0.1 mol/L", 1),
    ("18 g/mol", "18 kg/mol", 0),
    ("exothermic", "endothermic", None),
    ("B", "C", 0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), PHYSICS)
def test_physics(answer: str, reference: str, expected: float | None) -> None:
    assert score("physics", answer, reference) == expected


@pytest.mark.parametrize(("answer", "reference", "expected"), CHEMISTRY)
def test_chemistry(answer: str, reference: str, expected: float | None) -> None:
    assert score("chemistry", answer, reference) == expected


@pytest.mark.parametrize("question", ["How fast is it, in m/s?", "Find the speed (m/s).", "速度是多少?单位是m/s"])
def test_unit_that_the_question_names_may_be_absent(question: str) -> None:
    assert score("physics", "20", "20 m/s", question) == 1
    assert score("physics", "72 km/h", "20", question) == 1
    assert score("physics", "20 km/h", "20", question) == 0
    assert score("physics", "20 kg", "20", question) == 0
    assert score("physics", "20", "20 kg", question) is None


def test_words_of_a_question_are_no_units() -> None:
    assert score("physics", "12", "12 kg", "What is the change in mass?") is None
    assert score("physics", "12 kg", "12", "What is the change in mass?") is None


@pytest.mark.parametrize(
    ("name", "size", "base"),
    [
        ("km/h", constants.kmh, "m/s"),
        ("mph", constants.mph, "m/s"),
        ("eV", constants.eV, "J"),
        ("atm", constants.atm, "Pa"),
        ("torr", constants.torr, "Pa"),
        ("cal", constants.calorie, "J"),
        ("inch", constants.inch, "m"),
        ("lb", constants.lb, "kg"),
        ("Å", constants.angstrom, "m"),
        ("u", constants.atomic_mass, "kg"),
        ("deg", constants.degree, "rad"),
        ("L", constants.liter, "m^3"),
        ("hp", constants.hp, "W"),
    ],
)
def test_units_have_the_sizes_that_scipy_knows(name: str, size: float, base: str) -> None:
    one, other = read(f"1 {name}"), read(f"1 {base}")
    assert one is not None
    assert other is not None
    assert one.unit is not None
    assert other.unit is not None
    assert one.unit.dimension == other.unit.dimension
    assert one.unit.factor / other.unit.factor == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize(
    "text", ["5 apples", "5 m^999", "5 (m", "5 m)", "5 m/", "5 m//s", "5 9**9", "5 __import__", "m 5", "5 a"]
)
def test_what_is_no_quantity(text: str) -> None:
    assert read(text) is None


def test_random_formulas_have_the_atoms_that_they_were_made_of() -> None:
    rng = random.Random(5)
    for _ in range(300):
        groups = [
            (Counter({rng.choice(["C", "H", "O", "Na", "Cl", "Co", "Fe"]): rng.randint(1, 12)}), rng.randint(1, 4))
            for _ in range(rng.randint(1, 4))
        ]
        text, wanted = "", Counter[str]()
        for atoms, times in groups:
            inner = "".join(f"{name}{count if count > 1 else ''}" for name, count in atoms.items())
            text += f"({inner}){times}" if times > 1 else inner
            wanted.update({name: count * times for name, count in atoms.items()})
        found = substance(text)
        assert found is not None
        assert dict(found.counts) == dict(wanted), text


def test_sides_of_an_equation_keep_their_coefficients() -> None:
    sides = reaction("2H2 + O2 → 2H2O")
    assert sides is not None
    assert [[int(term.coefficient) for term in side] for side in sides] == [[2, 1], [2]]
