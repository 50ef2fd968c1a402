"""Thirteen families of small verifiable tasks that a 135M model sometimes gets right.

Four are reasoning-gym data sets at easy levels, nine are generated here. Each carries one solved example that is put
before the question: without it responses are longer than any short limit, with it they are short sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from rollout_tasks import Family, last_number, last_word, only_choice

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NAMES = "Anna Ben Clara David Emma Frank Grace Henry".split()
WORDS = (
    "apple bread chair cloud dance earth flame glass heart juice knife lemon mouse night ocean paper queen river "
    "stone table uncle voice water zebra bird cake duck fish gold hand king lion moon nose park road ship tree"
).split()


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(10, 1000), 2)
    return f"Which number is larger, {a} or {b}?", str(max(a, b))


def _parity(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(10, 999)
    return f"Is {n} even or odd?", "odd" if n % 2 else "even"


def _prime(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(2, 99)
    return f"Is {n} a prime number?", "yes" if all(n % d for d in range(2, n)) else "no"


def _first_letter(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f'What is the first letter of the word "{word}"?', word[0]


def _longer_word(rng: random.Random) -> tuple[str, str]:
    a, b = rng.choice([w for w in WORDS if len(w) == 4]), rng.choice([w for w in WORDS if len(w) == 5])
    first, second = rng.sample([a, b], 2)
    return f'Which word is longer, "{first}" or "{second}"?', b


def _dictionary(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(WORDS, 2)
    return f'Which word comes first in the dictionary, "{a}" or "{b}"?', min(a, b)


def _taller(rng: random.Random) -> tuple[str, str]:
    a, b, c = rng.sample(NAMES, 3)
    asked, answer = rng.choice([("tallest", a), ("shortest", c)])
    return f"{a} is taller than {b}. {b} is taller than {c}. Who is the {asked}?", answer


def _calendar(unit: str, names: list[str]) -> Callable[[random.Random], tuple[str, str]]:
    def draw(rng: random.Random) -> tuple[str, str]:
        i, n, step = rng.randrange(len(names)), rng.randint(1, 3), rng.choice([-1, 1])
        distance = f"{n} {unit}{'s' if n > 1 else ''} {'before' if step < 0 else 'after'}"
        return f"Which {unit} is {distance} {names[i]}?", names[(i + step * n) % len(names)]

    return draw


_PRODUCT = "Solve the following multiplication: 3 * 2. Give only the result as your final answer."
_SUM = "State the final answer to the following arithmetic problem: 4 + 3 ="
_TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
_ONE_DIGIT = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
FAMILIES = [
    # reasoning-gym; the name is the data set's
    Family("products", {"min_digits": 1, "max_digits": 1}, last_number, (_PRODUCT, "3 * 2 = 6")),
    Family("chain_sum", _TWO_TERMS, last_number, (_SUM, "4 + 3 = 7")),
    Family("basic_arithmetic", _ONE_DIGIT, last_number, ("Calculate 2 * 4.", "2 * 4 = 8")),
    Family(
        "letter_counting",
        {"min_words": 1, "max_words": 3},
        last_number,
        (
            'How many times does the letter "l" appear in the text: "small hill"?',
            "The letter l appears 4 times.",
        ),
    ),
    # generated above
    Family(
        "larger", _larger, last_number, ("Which number is larger, 25 or 310?", "The larger number is 310.")
    ),
    Family("parity", _parity, only_choice("even", "odd"), ("Is 6 even or odd?", "6 is an even number.")),
    Family("prime", _prime, only_choice("yes", "no"), ("Is 7 a prime number?", "Yes, 7 is prime.")),
    Family(
        "first_letter",
        _first_letter,
        last_word,
        ('What is the first letter of the word "sun"?', "The first letter is s."),
    ),
    Family(
        "longer_word",
        _longer_word,
        last_word,
        ('Which word is longer, "sun" or "planet"?', "The longer word is planet."),
    ),
    Family(
        "dictionary",
        _dictionary,
        last_word,
        ('Which word comes first in the dictionary, "sun" or "planet"?', "The first word is planet."),
    ),
    Family(
        "taller",
        _taller,
        last_word,
        ("Tom is taller than Jim. Jim is taller than Sue. Who is the shortest?", "The shortest is Sue."),
    ),
    Family(
        "day",
        _calendar("day", DAYS),
        only_choice(*DAYS),
        ("Which day is 1 day after Sunday?", "It is Monday."),
    ),
    Family(
        "month",
        _calendar("month", MONTHS),
        only_choice(*MONTHS),
        ("Which month is 1 month after May?", "It is June."),
    ),
]
