"""Random words, names, numbers and phrasings, each of which belongs to one split for ever.

The split is a hash of the text itself. A `Draw` hands out only what lies in its own split, so whatever a
skill makes of it, training and the held-out questions cannot share a word, a pair of operands or a
phrasing. It knows nothing of the skills.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "validation", "test"]

TEST_PERCENT = 12
VALIDATION_PERCENT = 8
MAX_TRIES = 5000            # many times what the rarest split needs; more means that it is empty

MIN_LETTERS = 3
MAX_LETTERS = 9

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
COMMON_LETTERS = "eeeetttaaaooiinnsshhrrddlluuccmmffggppwwbbvkyjxqz"
ONSETS = ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "qu", "r", "s", "t", "v", "w", "x", "y", "z"]
ONSETS += ["bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "ph", "pl", "pr", "sh", "sk", "sl", "st", "tr"]
CODAS = ["", "", "", "b", "d", "g", "k", "l", "ll", "m", "n", "nd", "ng", "nt", "p", "r", "rt", "s", "ss", "st", "t"]
CODAS += ["ck", "ft", "lk", "lt", "mp", "nk", "rd", "rk", "rm", "sh", "sk", "th", "tt", "x", "zz", "ff", "c", "f"]

ORDINARY = """
able about above actor after again agent alarm album angel animal answer apple april arm army art autumn baby back
bag baker ball banana bank baton beach bean bear beauty bed bell bird black blue board boat body book boot bottle box
boy branch bread bridge brother brown bucket bus butter button cake camera candle candy car card carpet castle cat
chair cheese cherry child church circle city class clock cloud coat coffee color cookie copper corn country cow cream
cup curtain dance day desk doctor dog door dragon dream dress drum duck eagle ear earth egg engine evening eye face
family farm father feather field finger fire fish flag floor flower food foot forest fork fox friend frog fruit garden
gate ghost giant gift girl glass goat gold grape grass green guitar hammer hand happy hat heart hello hill honey horse
house island jacket jelly juice jungle key king kitchen kite kitten knife ladder lake lamp leaf lemon letter light
lion lizard llama machine magic mango map market master meat milk mirror model money monkey moon morning mother
mountain mouse mouth museum music needle nest night nose number ocean office olive onion orange orchard oven paint
panda paper parrot party peach pear pencil pepper piano picture pillow pilot pizza planet plant plate pocket poet
potato prince pumpkin puppy purple queen question rabbit rain rainbow red ribbon rice ring river robot rocket roof
room rope rose salad salt sand school sea season seven shadow shark sheep ship shirt shoe silver sister sky small
snake snow soap sock song soup spider spoon spring square squirrel star stone story street student sugar summer sun
table tea teacher test thunder ticket tiger time toast tomato tower town toy train tree truck turtle umbrella uncle
valley velvet village violin voice wagon wall water whale wheat wheel window winter wolf wonder wood word worker
world yellow zebra
""".split()  # noqa: SIM905 - as a literal it would be four times as tall

FIRST_NAMES = """
Ada Adam Aisha Alan Alex Alice Amir Amy Ana Anna Anton Ben Bob Carla Carlos Clara Daniel Dave David Diego Elena Ella
Emil Emma Eric Eva Felix Fiona Frank George Grace Hana Hannah Henry Hugo Ian Ida Igor Ines Ivan Jack James Jan Jane
Jonas Julia Kai Karen Kate Ken Lara Laura Lea Leo Lena Liam Lily Linus Lisa Louis Lucy Luis Luke Maria Mark Marta Mary
Max Maya Mia Mila Milan Mona Nadia Nina Noah Nora Olga Oliver Oscar Otto Paul Paula Peter Pia Priya Rita Robert Rosa
Ruth Sam Sara Sarah Simon Sofia Sven Tanja Theo Tim Tina Tom Tony Uma Vera Victor Wei Yara Yuki Zoe
""".split()  # noqa: SIM905 - as a literal it would be four times as tall

CITIES = """
Amsterdam Ankara Athens Baghdad Bangkok Barcelona Beijing Berlin Bern Bogota Boston Brussels Budapest Cairo Chicago
Copenhagen Dakar Delhi Denver Dublin Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon
London Lyon Madrid Manila Miami Milan Moscow Mumbai Munich Nairobi Naples Osaka Oslo Paris Porto Prague Quito Riga Rome
Santiago Seattle Seoul Seville Shanghai Sofia Stockholm Sydney Tallinn Tehran Tokyo Toronto Tunis Turin Vienna Warsaw
Zurich
""".split()  # noqa: SIM905 - as a literal it would be four times as tall


def split_of(text: str) -> Split:
    """The one split that a word, pair or phrasing belongs to; capitals do not make it another."""
    percent = int.from_bytes(hashlib.blake2b(text.lower().encode(), digest_size=8).digest()) % 100
    if percent < TEST_PERCENT:
        return "test"
    return "validation" if percent < TEST_PERCENT + VALIDATION_PERCENT else "train"


class Draw:
    """A seeded source of words, names, numbers and phrasings of one split; `drawn` remembers them."""

    def __init__(self, split: Split, seed: int | str, brevity: float = 0.0) -> None:
        self.split = split
        self.brevity = brevity                  # how often a number has one digit, and a range few numbers
        self.random = random.Random(f"{split} {seed}")
        self.drawn: set[str] | None = None      # a set, when a test wants to know

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, whatever the split: for what everyone may see, such as the days of the week."""
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def word(self) -> str:
        return self._of_split(self._any_word)

    def name(self) -> str:
        return self._of_split(lambda: self._known_or_new(FIRST_NAMES))

    def city(self) -> str:
        return self._of_split(lambda: self._known_or_new(CITIES))

    def numbers(self, low: int, high: int) -> tuple[int, int]:
        """An ordered pair, both in [low, high]; the order counts: (3, 5) and (5, 3) may be in two splits."""
        return self.pair(lambda: (self._number(low, high), self._number(low, high)))

    def pair(self, make: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        a, b = self._of_split(lambda: "{},{}".format(*make())).split(",")
        return int(a), int(b)

    def phrase(self, *parts: Sequence[str]) -> str:
        """One option of each part, joined; the whole belongs to a split before its fields are filled in."""
        phrase = self._of_split(lambda: "".join(self.random.choice(part) for part in parts))
        return phrase if self.chance(0.15) else phrase[0].upper() + phrase[1:]

    def brief(self) -> bool:
        """Without brevity no chance is taken, and the draws that follow stay the same."""
        return self.brevity > 0 and self.chance(self.brevity)

    def _number(self, low: int, high: int) -> int:
        return self.random.randint(low, min(high, 9) if self.brief() else high)

    def _of_split(self, make: Callable[[], str]) -> str:
        text = make()
        for _ in range(MAX_TRIES):
            if split_of(text) == self.split:
                break
            text = make()
        else:
            raise ValueError(f"the {self.split} split has nothing like {text!r}")
        if self.drawn is not None:
            self.drawn.add(text.lower())
        return text

    def _any_word(self) -> str:
        kind = self.random.random()
        if kind < 0.25:
            return self.random.choice(ORDINARY)
        length = self.random.randint(MIN_LETTERS, MAX_LETTERS)
        if kind < 0.45:
            return "".join(self.random.choices(LETTERS, k=length))
        if kind < 0.65:
            return "".join(self.random.choices(COMMON_LETTERS, k=length))
        return self._syllables(length)

    def _known_or_new(self, known: Sequence[str]) -> str:
        if self.chance(0.3):
            return self.random.choice(known)
        return self._syllables(self.random.randint(MIN_LETTERS, MAX_LETTERS)).capitalize()

    def _syllables(self, length: int) -> str:
        word = self.random.choice(VOWELS) if self.chance(0.2) else ""
        while len(word) < length:
            word += self.random.choice(ONSETS) + self.random.choice(VOWELS) + self.random.choice(CODAS)
        return word[:length]
