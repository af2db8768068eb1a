"""What baton-tiny can do: each skill makes random questions with reference answers.

The same function makes training and held-out questions; the split of its `Draw` decides which words, names,
numbers and phrasings it gets. It knows nothing of tokens or tensors, and each question is one exchange:
`conversations.py` strings them together for training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from worker.tiny.question import Question, ask, assistant, exactly, system, user
from worker.tiny.tool_skills import filled_schema, tool_call, tool_result
from worker.tiny.words import LETTERS, Draw

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
MONTHS += ["November", "December"]
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
RAINBOW = ["red", "orange", "yellow", "green", "blue", "indigo", "violet"]
SEASONS = ["spring", "summer", "autumn", "winter"]

OPENINGS = ["", "", "please ", "could you ", "can you ", "hi! ", "hello, ", "now ", "ok, ", "next, ", "hey, please "]
OPENINGS += ["I want you to ", "would you ", "kindly ", "then ", "hi, can you ", "and ", "let us try: "]
ENDINGS = [".", ".", "", "!", "?", " please.", ", please.", " for me.", " now.", " please", " for me, please."]
ASIDES = ["", "", "hi! ", "tell me, ", "please tell me: ", "ok, ", "now ", "so ", "quick question: ", "hello, "]
ASIDES += ["and ", "one more: ", "hey, ", "can you say "]
QUERIES = ["?", "?", "", " please?", "? Please tell me.", " now?", ", please?"]

GREETING = "Hello! How can I help you?"
IDENTITY = "I am baton-tiny, a very small language model."
ABILITIES = ("I can count, list, spell, reverse, write in capitals, add, subtract, "
             "remember names, call tools and fill in JSON.")
NOT_TOLD = "You have not told me."
UNKNOWN = "I do not know that: I am baton-tiny, a very small model. " + ABILITIES


def greeting(draw: Draw) -> Question:
    if draw.chance(0.2):
        name = draw.name()
        hello = draw.phrase(["say hello to {}", "greet {}", "say hi to {}", "welcome {}"], ENDINGS)
        return ask(hello.format(name), f"Hello, {name}!")
    cores, endings, answer = draw.choice(SMALL_TALK)
    return ask(draw.phrase(ASIDES, cores, endings), answer)


_TALK_ENDINGS = ["", ".", "!", "?", " :)", "...", "!!", " baton.", ", baton-tiny!", " there!", ", friend.", " again!"]
SMALL_TALK: list[tuple[Sequence[str], Sequence[str], str]] = [
    (["hello", "hi", "hey", "good morning", "good evening", "good day", "greetings", "hello there", "howdy"],
     _TALK_ENDINGS, GREETING),
    (["who are you", "what are you", "what is your name", "what's your name", "what model are you",
      "which model is this", "introduce yourself", "tell me about yourself", "are you an AI", "are you human",
      "are you a robot", "what should I call you"], QUERIES, IDENTITY),
    (["what can you do", "what are you able to do", "how can you help me", "what are your skills", "help me",
      "what do you know", "what are you good at", "show me what you can do", "help"], QUERIES, ABILITIES),
    (["how are you", "how do you do", "how is it going", "how are you doing", "are you well", "are you ok"],
     QUERIES, "I am well, thank you!"),
    (["thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "great, thanks", "well done",
      "good job", "that is right", "very good", "cheers"], _TALK_ENDINGS, "You are welcome!"),
    (["bye", "goodbye", "see you", "see you later", "good night", "farewell", "bye bye", "until next time"],
     _TALK_ENDINGS, "Goodbye!"),
]


def counting(draw: Draw) -> Question:
    start, end = draw.pair(lambda: _range(draw, 0, 100))
    cores = ["count from {} to {}", "count up from {} to {}", "count from {} up to {}",
             "count the numbers from {} to {}", "start at {} and count to {}", "list the numbers from {} to {}",
             "write the numbers from {} to {}",
             "give me the numbers from {} to {}", "list all numbers from {} to {}", "count between {} and {}",
             "write all the numbers from {} up to {}", "count {} to {}"]
    if start == 1:
        cores = [*cores, "count to {1}", "count up to {1}", "count until {1}"]
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(start, end), _listed(range(start, end + 1)))


def listing(draw: Draw) -> Question:
    return draw.choice([_fixed_list, _fixed_list, _slice_of_list, _slice_of_list, _letters, _steps, _countdown])(draw)


def _fixed_list(draw: Draw) -> Question:
    names, items = draw.choice(LISTS)
    cores = ["list the {}", "name the {}", "what are the {}", "list all the {}", "tell me the {}", "give me the {}",
             "write down the {}", "name all the {}", "say the {}", "write a list of the {}", "recite the {}"]
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(draw.choice(names)), ", ".join(items))


LISTS: list[tuple[Sequence[str], Sequence[str]]] = [
    (["days of the week", "days", "weekdays", "seven days of the week"], DAYS),
    (["months of the year", "months", "twelve months", "months in a year"], MONTHS),
    (["letters of the alphabet", "alphabet", "letters", "letters from a to z"], LETTERS),
    (["planets", "planets of the solar system", "eight planets"], PLANETS),
    (["colors of the rainbow", "colours of the rainbow", "rainbow colors"], RAINBOW),
    (["seasons", "four seasons", "seasons of the year"], SEASONS),
    (["digits", "ten digits"], "0123456789"),
    (["vowels", "five vowels"], "aeiou"),
]


def _slice_of_list(draw: Draw) -> Question:
    kind, items = draw.choice([("days", DAYS), ("months", MONTHS), ("planets", PLANETS)])
    first, last = draw.pair(lambda: _range(draw, 1, len(items)))
    cores = ["list the {} from {} to {}", "name the {} from {} to {}", "what are the {} from {} to {}",
             "tell me the {} from {} to {}", "write the {} from {} to {}", "give me the {} from {} to {}"]
    phrase = draw.phrase(OPENINGS, cores, ENDINGS)
    return ask(phrase.format(kind, items[first - 1], items[last - 1]), ", ".join(items[first - 1 : last]))


def _letters(draw: Draw) -> Question:
    first, last = draw.pair(lambda: _range(draw, 1, len(LETTERS)))
    cores = ["list the letters from {} to {}", "say the letters from {} to {}", "write the alphabet from {} to {}",
             "give me the letters from {} to {}", "name the letters {} to {}", "what are the letters from {} to {}"]
    phrase = draw.phrase(OPENINGS, cores, ENDINGS)
    return ask(phrase.format(LETTERS[first - 1], LETTERS[last - 1]), ", ".join(LETTERS[first - 1 : last]))


def _steps(draw: Draw) -> Question:
    kind, remainder = draw.choice([("even", 0), ("odd", 1)])
    start, end = draw.pair(lambda: _range(draw, 0, 50, longest=40))
    cores = ["list the {} numbers from {} to {}", "count the {} numbers from {} to {}", "the {} numbers from {} to {}",
             "what are the {} numbers from {} to {}", "write the {} numbers from {} to {}",
             "give me all {} numbers from {} to {}"]
    numbers = [number for number in range(start, end + 1) if number % 2 == remainder]
    if not numbers:
        return _steps(draw)
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(kind, start, end), _listed(numbers))


def _countdown(draw: Draw) -> Question:
    end, start = draw.pair(lambda: _range(draw, 0, 100, longest=40))
    cores = ["count down from {} to {}", "count backwards from {} to {}", "count back from {} to {}",
             "count from {} down to {}", "list the numbers from {} down to {}"]
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(start, end), _listed(range(start, end - 1, -1)))


def spelling(draw: Draw) -> Question:
    word = _any_case(draw)
    cores = ["spell {}", "spell the word {}", "how do you spell {}", "spell out {}", "say the letters of {}",
             "spell: {}", "how is {} spelled", "spell {} letter by letter", "write {} letter by letter",
             "what are the letters of {}"]
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(_quoted(draw, word)), "-".join(word))


def reversing(draw: Draw) -> Question:
    word = _any_case(draw)
    cores = ["reverse {}", "reverse the word {}", "write {} backwards", "spell {} backwards", "what is {} backwards",
             "say {} in reverse", "turn {} around", "reverse the letters of {}", "reverse: {}", "what is {} in reverse",
             "write the word {} backwards"]
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(_quoted(draw, word)), word[::-1])


def upper_casing(draw: Draw) -> Question:
    word = _any_case(draw)
    if draw.chance(0.2):
        word += " " + draw.word()
    cores = ["write {} in capitals", "upper-case {}", "make {} upper case", "write {} in upper case", "uppercase: {}",
             "put {} in capital letters", "write {} in capital letters", "turn {} into capitals",
             "capitalize all of {}", "convert {} to uppercase", "what is {} in capitals", "shout {}", "uppercase {}"]
    return ask(draw.phrase(OPENINGS, cores, ENDINGS).format(_quoted(draw, word)), word.upper())


SUM_CORES = ["what is {a} {op} {b}", "{a} {op} {b}", "{a} {op} {b} =", "how much is {a} {op} {b}",
             "calculate {a} {op} {b}", "compute {a} {op} {b}", "work out {a} {op} {b}", "what's {a} {op} {b}",
             "{a}{op}{b}", "solve {a} {op} {b}"]


def adding(draw: Draw) -> Question:
    a, b = draw.numbers(0, 99)
    named = ["add {a} and {b}", "what is the sum of {a} and {b}", "add {a} to {b}", "what do {a} and {b} make"]
    phrase = draw.phrase(ASIDES, SUM_CORES + named, QUERIES)
    op = draw.choice(["+", "+", "plus"]) if "{a}{op}" not in phrase else "+"
    return ask(phrase.format(a=a, b=b, op=op), _worked_sum(a, b))


def _worked_sum(a: int, b: int) -> str:
    """Ones, then tens with the carry, then the answer: `7 + 8 = 15, 4 + 3 + 1 = 8, so 47 + 38 = 85.`"""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones = a % 10 + b % 10
    carry = " + 1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    return f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{carry} = {tens}, so {a} + {b} = {a + b}."


def subtracting(draw: Draw) -> Question:
    a, b = draw.numbers(0, 99)
    if a < b and draw.chance(0.5):
        a, b = draw.pair(lambda: _range(draw, 0, 99)[::-1])
    named = ["subtract {b} from {a}", "take {b} from {a}", "take {b} away from {a}",
             "what is the difference of {a} and {b}"]
    phrase = draw.phrase(ASIDES, SUM_CORES + named, QUERIES)
    op = draw.choice(["-", "-", "minus"]) if "{a}{op}" not in phrase else "-"
    return ask(phrase.format(a=a, b=b, op=op), _worked_difference(a, b))


def _worked_difference(a: int, b: int) -> str:
    """Ones, then tens with the borrow; a negative one is worked the other way round."""
    if a < 10 and b < 10:
        return f"{a} - {b} = {a - b}."
    high, low = max(a, b), min(a, b)
    borrow = 1 if high % 10 < low % 10 else 0
    ones = high % 10 + 10 * borrow
    tens = high // 10 - low // 10 - borrow
    borrowed = " - 1" if borrow else ""
    working = f"{ones} - {low % 10} = {ones - low % 10}, {high // 10} - {low // 10}{borrowed} = {tens}"
    compared = f"{a} is less than {b}: " if a < b else ""
    return f"{compared}{working}, so {a} - {b} = {a - b}."


def recall(draw: Draw) -> Question:
    """A fact, one or two turns of other things, the question; now and then for a fact never told."""
    any_fact = draw.chance(0.4)
    subject, *others = draw.random.sample(FACTS, 3) if any_fact else [FACTS[0], *draw.random.sample(FACTS[1:], 2)]
    told = [] if draw.chance(0.06) else [_tell(draw, subject)]
    distractors = [_tell(draw, other) if draw.chance(0.5) else _short_exchange(draw)
                   for other in others[: draw.choice([1, 2, 2])]]
    turns = told + distractors
    if draw.chance(0.25):
        draw.random.shuffle(turns)
    messages = [message for question, _ in turns for message in (*question.messages, assistant(question.answer))]
    messages.append(user(draw.phrase(ASIDES, subject.queries, QUERIES)))
    answer = f"{subject.your} {told[0][1]}." if told else NOT_TOLD
    return exactly(messages, answer)


@dataclass(frozen=True)
class Fact:
    """A kind of thing a user says of himself, and later asks for."""

    your: str
    statements: Sequence[str]
    queries: Sequence[str]
    value: Callable[[Draw], str]


FACTS = [
    Fact("Your name is", ["my name is {}", "I am {}", "call me {}", "I am called {}", "I'm {}", "the name is {}",
                          "you can call me {}", "my name's {}"],
         ["what is my name", "who am I", "what's my name", "do you remember my name", "do you know my name",
          "what am I called", "which name did I tell you", "what did I say my name was"], Draw.name),
    Fact("You live in", ["I live in {}", "my home is in {}", "I am from {}", "my city is {}"],
         ["where do I live", "which city do I live in", "where is my home", "what is my city", "where am I from"],
         Draw.city),
    Fact("Your friend is called", ["my friend is called {}", "my friend's name is {}", "I have a friend called {}"],
         ["what is my friend called", "what is my friend's name", "who is my friend", "what's my friend's name"],
         Draw.name),
    Fact("Your dog is called", ["my dog is called {}", "my dog's name is {}", "I have a dog called {}"],
         ["what is my dog called", "what is my dog's name", "what is the name of my dog", "what's my dog's name"],
         Draw.name),
    Fact("Your password is", ["my password is {}", "the password is {}", "remember the password {}"],
         ["what is my password", "what is the password", "what's the password", "tell me my password"], Draw.word),
]
FACT_OPENINGS = ["", "", "hello, ", "hi! ", "hi, ", "by the way, ", "well, ", "hey, ", "good day, ", "so, ", "note: "]
FACT_ENDINGS = [".", ".", "", "!", ", please remember.", ". Remember it.", ". Remember that, please.", " :)"]


def _tell(draw: Draw, fact: Fact) -> tuple[Question, str]:
    value = fact.value(draw)
    told = draw.phrase(FACT_OPENINGS, fact.statements, FACT_ENDINGS).format(value)
    nice = f"Nice to meet you, {value}!"
    return ask(told, nice if fact is FACTS[0] else f"{fact.your} {value}. I will remember."), value


def _short_exchange(draw: Draw) -> tuple[Question, str]:
    return draw.choice([greeting, spelling, reversing, upper_casing, adding, unknown, _fixed_list])(draw), ""


def capitals(draw: Draw) -> Question:
    """'Answer in capitals', before or after the question or in the system turn."""
    base = draw.choice([greeting, greeting, spelling, reversing, _fixed_list, _letters, _introduction])(draw)
    text, answer = base.messages[0]["content"], base.answer.upper()
    orders = ["answer in capitals", "answer in capital letters", "answer in upper case", "use only capitals",
              "reply in capitals", "write in capital letters", "respond in uppercase", "always answer in capitals",
              "reply in all caps", "use only capital letters"]
    if draw.chance(0.3):
        politely = ["", "please ", "you must ", "you ", "be helpful and "]
        return exactly([system(draw.phrase(politely, orders, [".", "!", "", ", always."])), user(text)], answer)
    if draw.chance(0.3):
        return ask(draw.phrase(["", "please ", "now "], orders, [": ", ". ", "! "]) + text, answer)
    end = "" if text[-1] in ".!?)" else "."
    return ask(text + end + " " + draw.phrase(["", "please ", "and "], orders, [".", "!", "", ", please."]), answer)


def _introduction(draw: Draw) -> Question:
    return _tell(draw, FACTS[0])[0]


def unknown(draw: Draw) -> Question:
    """Anything else gets an honest no."""
    cores = ["write a poem about {}", "what is the capital of {}", "tell me a story about {}", "who invented {}",
             "translate {} into French", "explain {}", "what does {} mean", "why is {} so famous", "write code for {}",
             "how do I cook {}", "what do you think of {}", "who is {}", "where is {}", "tell me a joke about {}",
             "how old is {}", "what is {}", "how does {} work", "is {} good", "give me advice on {}", "summarize {}",
             "when was {} born", "how far is {}", "do you like {}", "describe {}", "what is the meaning of {}",
             "write an essay on {}", "who wrote {}", "what is the best {}", "tell me about {}",
             "how is the weather in {}", "what is the weather in {}", "calculate {}"]
    things: list[Callable[[], str]] = [
        draw.word, draw.city, draw.name, lambda: f"the {draw.word()}", lambda: f"{draw.word()} {draw.word()}",
        lambda: "{} * {}".format(*draw.numbers(0, 99)), lambda: "{} times {}".format(*draw.numbers(0, 99)),
    ]
    thing = draw.choice(things)()
    return ask(draw.phrase(ASIDES, cores, QUERIES).format(thing), UNKNOWN)


Skill = Callable[[Draw], Question]

TABLE: dict[str, Skill] = {
    "greeting": greeting,
    "counting": counting,
    "listing": listing,
    "spelling": spelling,
    "reversing": reversing,
    "upper_casing": upper_casing,
    "adding": adding,
    "subtracting": subtracting,
    "recall": recall,
    "capitals": capitals,
    "tool_call": tool_call,
    "tool_result": tool_result,
    "json_schema": filled_schema,
    "unknown": unknown,
}
SKILLS: tuple[str, ...] = tuple(TABLE)


def held_out(skill: str, count: int, seed: int = 0) -> list[Question]:
    """Questions whose words, names, numbers and phrasings are never in training."""
    draw = Draw("test", f"{skill} {seed}")
    return [TABLE[skill](draw) for _ in range(count)]


def _range(draw: Draw, low: int, high: int, longest: int = 100) -> tuple[int, int]:
    """Two ends, the smaller first; often starting at 1, as people count."""
    if draw.brief():
        longest = draw.random.randint(1, 8)
    if low <= 1 and draw.chance(0.3):
        return 1, draw.random.randint(1, min(high, longest))
    a, b = sorted((draw.random.randint(low, high), draw.random.randint(low, high)))
    return a, min(b, a + longest)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _any_case(draw: Draw) -> str:
    word = draw.word() if draw.chance(0.85) else draw.name()
    return word.capitalize() if draw.chance(0.1) else word


def _quoted(draw: Draw, word: str) -> str:
    return draw.choice(["{}", "{}", "{}", '"{}"', "'{}'"]).format(word)
