"""How many answers per second one core scores by rules: `python -m benchmarks.answers`.

Every round has other answers, so that no cache has seen them. The last line is the slowest verifier's ratio to 10,000
answers per second; the command fails below 1.
"""

from __future__ import annotations

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


CASES: dict[str, tuple[str, Callable[[random.Random], Made]]] = {
    "math, numbers": ("math", numbers),
    "math, short answers": ("math", short_answers),
    "physics": ("physics", quantities),
    "chemistry": ("chemistry", formulas),
    "chart": ("chart", amounts),
    "counting": ("counting", counts),
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
