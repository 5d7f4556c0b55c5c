"""How many answers per second one core scores by rules: `python -m benchmarks.answers`.

Every round has other answers, so that no cache has seen them. The last line is the slowest verifier's ratio to 10,000
answers per second; the command fails below 1.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

from rewards.table import verifier_named
from rewards.verdict import Item

WANTED = 10_000  # answers per second
ROUNDS = 5
ANSWERS = 4000  # per round

Made = tuple[str, Item]


def numbers(rng: random.Random) -> Made:
    """Return a number in one of several notations, and its reference."""
    number = rng.randint(1, 10**6) / 100
    text = rng.choice(
        [f"{number}", f"{number:,}", f"{number:.6e}", f"\\frac{{{int(number * 100)}}}{{100}}", f"${number}$"]
    )
    return text, Item("How many?", f"{number}")


def short_answers(rng: random.Random) -> Made:
    """Return an option, a whole number, a fraction or a decimal number."""
    number = rng.randint(1, 999)
    text = rng.choice([f"{number}", f"{number}.0", f"({rng.choice('ABCD')})", f"{number}/7", "yes"])
    return text, Item("", rng.choice([f"{number}", "B"]))


def quantities(rng: random.Random) -> Made:
    """Return a speed or a length in another unit."""
    number = rng.randint(1, 10**5) / 10
    return rng.choice([(f"{number} km/h", Item("", f"{number / 3.6} m/s")), (f"{number} cm", Item("", f"{number} m"))])


def formulas(rng: random.Random) -> Made:
    """Return an organic molecule."""
    carbon, hydrogen = rng.randint(1, 99), rng.randint(1, 99)
    return f"C_{{{carbon}}}H_{{{hydrogen}}}O2", Item("", f"C{carbon}H{hydrogen}O2")


def amounts(rng: random.Random) -> Made:
    """Return a value of a chart."""
    number = rng.randint(1, 10**5) / 10
    return rng.choice([f"${number} million", f"{number}%", f"{number:,}"]), Item("How many?", f"{number}")


def counts(rng: random.Random) -> Made:
    """Return a count with its noun."""
    number = rng.randint(1, 10**4)
    return f"{number} {rng.choice(['apples', 'dots', 'people'])}", Item("", f"{number}")


def short_texts(rng: random.Random) -> Made:
    """Return a length, a direction, an option or some words."""
    number = rng.randint(1, 10**6)
    return rng.choice(
        [
            (f"{number} m", Item("", f"{number * 100} cm")),
            (f"the tower {number}.", Item("", f"Tower {number}")),
            ("on the left", Item("", "right")),
            (f"(B) a dog {number}", Item(f"Which? (A) a cat {number} (B) a dog {number}", "B")),
        ]
    )


_WORDS = "the cat dog sits on a red mat near blue lamp with two big books and one small cup"


def phrases(rng: random.Random) -> Made:
    """Return two phrases that no rule decides: all are tried."""
    one, other = (" ".join(rng.choices(_WORDS.split(), k=rng.randint(1, 6))) for _ in range(2))
    return rng.choice([(one, Item("", other)), (f"{one} {rng.randint(0, 9999)}", Item("", f"{other} 7"))])


def pages(rng: random.Random) -> Made:
    """Return a transcription of up to 400 letters with some errors."""
    page = "".join(rng.choices("abcdefgh ", k=rng.randint(20, 400)))
    return f"{page[:-3]}xyz", Item("", page)


def boxes(rng: random.Random) -> Made:
    """Return up to 8 boxes, and others near them."""
    corners = [(rng.randint(0, 800), rng.randint(0, 800)) for _ in range(rng.randint(1, 8))]
    wanted = [[x, y, x + rng.randint(5, 190), y + rng.randint(5, 190)] for x, y in corners]
    return json.dumps([[value + rng.randint(0, 3) for value in box] for box in wanted]), Item("", json.dumps(wanted))


def intervals(rng: random.Random) -> Made:
    """Return an interval of a video."""
    start = rng.randint(0, 500)
    text = rng.choice([f"0:{start % 60:02d} - 9:{start % 60:02d}", f"{start}.5 to {start + 10} s"])
    return text, Item("", f"[{start}, {start + 9}]")


def taps(rng: random.Random) -> Made:
    """Return an action on a telephone."""
    x, y = rng.randint(0, 400), rng.randint(0, 400)
    action = {"action_type": "input_text", "text": f"weather {x}", "override": True, "box_2d": [[x, y, x + 99, y + 50]]}
    return json.dumps({**action, "text": f"wether {x}"}), Item("", json.dumps(action))


def clicks(rng: random.Random) -> Made:
    """Return an action on a desktop."""
    x = rng.randint(0, 980)
    return rng.choice(
        [
            (
                f"left_click(start_box='[{x},{x}]')",
                Item("", f"left_click(start_box='[{x + 9},{x}]', element_info='OK')"),
            ),
            (f"type(content='hello {x}')", Item("", f"type(content='hallo {x}')")),
        ]
    )


def commands(rng: random.Random) -> Made:
    """Return an action on a web page."""
    element = rng.randint(0, 99)
    return f"Type [{element}]; [weather {element}]", Item("", f"Type [{element}]; [wether {element}]")


def programs(rng: random.Random) -> Made:
    """Return a function of Python, and another."""
    code = f"def f(a, b={rng.randint(0, 10**6)}):\n    if a > b:\n        return [a, b]\n    return b\n"
    return code, Item("", code.replace(">", ">="))


def instructions(rng: random.Random) -> Made:
    """Return a text with constraints."""
    constraints = [{"rule": "words", "at_most": 30}, {"rule": "bullets", "exactly": 2}]
    return f"The tower {rng.random()} is in Paris.\n\n- one\n- two", Item("", json.dumps(constraints))


CASES: dict[str, tuple[str, Callable[[random.Random], Made]]] = {
    "math, numbers": ("math", numbers),
    "math, short answers": ("math", short_answers),
    "physics": ("physics", quantities),
    "chemistry": ("chemistry", formulas),
    "chart": ("chart", amounts),
    "counting": ("counting", counts),
    "vqa": ("vqa", short_texts),
    "vqa, undecided": ("vqa", phrases),
    "ocr": ("ocr", pages),
    "grounding": ("grounding", boxes),
    "video": ("video", intervals),
    "gui_mobile": ("gui_mobile", taps),
    "gui_desktop": ("gui_desktop", clicks),
    "gui_web": ("gui_web", commands),
    "code": ("code", programs),
    "instruction": ("instruction", instructions),
}


def rate(verifier: str, make: Callable[[random.Random], Made], seed: int) -> float:
    """Return answers per second of CPU time in one round."""
    rng = random.Random(seed)
    made = [make(rng) for _ in range(ANSWERS)]
    score = verifier_named(verifier).score
    begun = time.process_time()
    for answer, item in made:
        score(answer, item)
    return ANSWERS / (time.process_time() - begun)


def main() -> int:
    """Print a table of rates; return 1 if one is below the limit."""
    ratios = []
    print(f"{'answers':22} {'median/s':>10} {'worst/s':>10}")
    for name, (verifier, make) in CASES.items():
        rate(verifier, make, -1)  # imports
        rates = sorted(rate(verifier, make, seed) for seed in range(ROUNDS))
        ratios.append(rates[ROUNDS // 2] / WANTED)
        print(f"{name:22} {rates[ROUNDS // 2]:10,.0f} {rates[0]:10,.0f}")
    print(f"slowest / {WANTED:,} per second: {min(ratios):.2f} (limit 1)")
    return int(min(ratios) < 1)


if __name__ == "__main__":
    sys.exit(main())
