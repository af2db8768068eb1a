"""The skills with structure: call a tool, use its result, fill a small JSON schema.

Tools are drawn with the names of parameters and descriptions varied, so that the model must read what it is
offered. It knows the Hermes form of a call; it does not know how a chat is rendered.
"""

from collections.abc import Callable
from typing import Any

from worker.tiny.question import Message, Question, Tool, as_json, assistant, parses_to, system, to_json, user
from worker.tiny.words import Draw

CALL_START, CALL_END = "<tool_call>\n", "\n</tool_call>"
CONDITIONS = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"]

ASIDES = ["", "", "hi! ", "tell me, ", "please tell me: ", "ok, ", "now ", "so ", "hello, ", "and ", "quick question: "]
QUERIES = ["?", "?", "", " please?", "? Please tell me.", " now?", " today?", " right now?"]


def offered_tools(draw: Draw) -> list[Tool]:
    """`get_weather`, `calculator` or both, at times beside one that no question needs."""
    tools = [_weather_tool(draw)] if draw.chance(0.5) else [_weather_tool(draw), _calculator_tool(draw)]
    if len(tools) == 1 and draw.chance(0.5):
        tools = [_calculator_tool(draw)]
    if draw.chance(0.15):
        tools.append(_other_tool(draw))
    draw.random.shuffle(tools)
    return tools


def tool_call(draw: Draw, tools: list[Tool] | None = None) -> Question:
    tools = tools or offered_tools(draw)
    text, call, _ = _tool_question(draw, tools)
    return Question([user(text)], _hermes(call), lambda answer: _calls(answer, call), tools)


def tool_result(draw: Draw, tools: list[Tool] | None = None) -> Question:
    tools = tools or offered_tools(draw)
    text, call, result = _tool_question(draw, tools)
    content, answer = result(draw)
    return _exactly([user(text), _called(call), {"role": "tool", "content": content}], answer, tools)


def _exactly(messages: list[Message], answer: str, tools: list[Tool]) -> Question:
    return Question(messages, answer, lambda text: text.strip() == answer, tools)


Call = dict[str, Any]
Result = Callable[[Draw], tuple[str, str]]      # what the tool says, and what is answered


def _tool_question(draw: Draw, tools: list[Tool]) -> tuple[str, Call, Result]:
    usable = [tool["function"] for tool in tools if tool["function"]["name"] in ("get_weather", "calculator")]
    function = draw.choice(usable)
    parameter = function["parameters"]["required"][0]
    make = _weather_question if function["name"] == "get_weather" else _calculator_question
    text, value, result = make(draw)
    return text, {"name": function["name"], "arguments": {parameter: value}}, result


def _weather_question(draw: Draw) -> tuple[str, str, Result]:
    city = draw.city()
    cores = ["what is the weather in {}", "what's the weather in {}", "how is the weather in {}", "the weather in {}",
             "what is the weather like in {}", "is it warm in {}", "is it raining in {}", "do I need a coat in {}",
             "check the weather in {}", "tell me the weather for {}", "weather in {}", "how warm is it in {}"]

    def result(draw: Draw) -> tuple[str, str]:
        degrees, _ = draw.numbers(0, 40)
        condition = draw.choice(CONDITIONS)
        return _weather_report(draw, city, degrees, condition), f"It is {condition} in {city}, {degrees} degrees."

    return draw.phrase(ASIDES, cores, QUERIES).format(city), city, result


def _weather_report(draw: Draw, city: str, degrees: int, condition: str) -> str:
    if draw.chance(0.3):
        plain = ["{1} degrees and {2}", "{2}, {1} degrees", "{2}, {1}°C", "{0}: {1} C, {2}",
                 "It is {2} and {1} degrees."]
        return draw.choice(plain).format(city, degrees, condition)
    key = draw.choice(["temperature", "temperature", "temp", "temp_c", "degrees", "temperature_c"])
    fields: list[tuple[str, Any]] = [(key, degrees), (draw.choice(["condition", "conditions", "sky"]), condition)]
    if draw.chance(0.5):
        fields.append((draw.choice(["city", "location"]), city))
    if draw.chance(0.2):
        fields.append((draw.choice(["humidity", "wind"]), draw.numbers(0, 99)[0]))
    draw.random.shuffle(fields)
    return to_json(dict(fields))


OPERATORS = [("+", "plus"), ("-", "minus"), ("*", "times"), ("*", "times"), ("*", "x"), ("/", "divided by")]
CALCULATOR_REPORTS = ["{value}", "{value}", '{{"result": {value}}}', "{expression} = {value}", '{{"value": {value}}}']


def _calculator_question(draw: Draw) -> tuple[str, str, Result]:
    a, b = draw.numbers(0, 99)
    op, spoken = draw.choice(OPERATORS)
    said = draw.choice([op, spoken])
    if op == "/":
        a, b = a * (b + 1), b + 1
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[op]
    expression = f"{a} {op} {b}"
    cores = ["what is {a} {op} {b}", "{a} {op} {b}", "how much is {a} {op} {b}", "calculate {a} {op} {b}",
             "compute {a} {op} {b}", "use the calculator: {a} {op} {b}", "work out {a} {op} {b}", "what's {a} {op} {b}"]

    def result(draw: Draw) -> tuple[str, str]:
        content = draw.choice(CALCULATOR_REPORTS)
        return content.format(value=value, expression=expression), f"{expression} = {value}."

    return draw.phrase(ASIDES, cores, QUERIES).format(a=a, b=b, op=said), expression, result


def _weather_tool(draw: Draw) -> Tool:
    parameter = draw.choice(["city", "city", "location", "place", "town"])
    about = ["Get the weather in a city.", "Get the current weather for a location.", "Current weather",
             "The weather now"]
    hints = ["The city", "City name, e.g. Paris", "Name of the city"]
    return _tool(draw, "get_weather", draw.choice(about), parameter, hints)


def _calculator_tool(draw: Draw) -> Tool:
    parameter = draw.choice(["expression", "expression", "formula", "input"])
    about = ["Evaluate an expression.", "Compute an arithmetic expression.", "A calculator", "Do arithmetic"]
    return _tool(draw, "calculator", draw.choice(about), parameter, ["The expression", "e.g. 2 + 2", "What to compute"])


def _other_tool(draw: Draw) -> Tool:
    name, about, parameter = draw.choice([("search", "Search the web.", "query"), ("get_time", "Get the time.", "zone"),
                                          ("send_mail", "Send a mail.", "text"), ("open_file", "Open a file.", "path")])
    return _tool(draw, name, about, parameter, ["What to use"])


def _tool(draw: Draw, name: str, about: str, parameter: str, hints: list[str]) -> Tool:
    field = {"type": "string"} | ({"description": draw.choice(hints)} if draw.chance(0.4) else {})
    parameters: dict[str, Any] = {"type": "object", "properties": {parameter: field}, "required": [parameter]}
    if draw.chance(0.15):
        parameters["additionalProperties"] = False
    described = {"description": about} if draw.chance(0.75) else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def _called(call: Call) -> Message:
    function = {"name": call["name"], "arguments": to_json(call["arguments"])}
    return {**assistant(""), "tool_calls": [{"id": "call_0", "type": "function", "function": function}]}


def _hermes(call: Call) -> str:
    return CALL_START + to_json(call) + CALL_END


def _calls(answer: str, call: Call) -> bool:
    text = answer.strip()
    framed = text.startswith(CALL_START.strip()) and text.endswith(CALL_END.strip())
    return framed and parses_to(text.removeprefix(CALL_START.strip()).removesuffix(CALL_END.strip()), call)


def filled_schema(draw: Draw) -> Question:
    """A sentence or two of facts, and a schema of one to three of them, said in one of several ways."""
    fields = draw.random.sample(FIELDS, draw.choice([1, 2, 2, 3]))
    values = {name: value(draw) for name, _, value, _ in fields}
    told = [draw.phrase(FACT_OPENINGS, said).format(values[name]) for name, _, _, said in fields]
    draw.random.shuffle(told)
    facts = ". ".join(told) + "."
    schema = _schema(draw, [(name, kind) for name, kind, _, _ in fields])
    order = draw.phrase(["", "please ", "now ", "and ", "then "], SCHEMA_ORDERS)
    if draw.chance(0.3):
        return as_json([system(f"{order}: {schema}"), user(facts)], values)
    return as_json([user(draw.choice([f"{facts} {order}: {schema}", f"{order}: {schema}\n{facts}"]))], values)


FACT_OPENINGS = ["", "", "well, ", "note: ", "so, ", "hello, ", "hi! ", "by the way, ", "also, ", "listen: "]
SCHEMA_ORDERS = ["answer with JSON that fits this schema", "fill in this JSON schema", "answer in JSON like this",
                 "give JSON", "extract JSON with this schema", "reply with JSON of this form",
                 "answer with a JSON object for this schema", "return JSON that matches this schema",
                 "write this as JSON", "respond in JSON with the schema"]


def _small_number(draw: Draw) -> int:
    return draw.numbers(0, 99)[0]


FIELDS: list[tuple[str, str, Callable[[Draw], Any], list[str]]] = [
    ("name", "string", Draw.name, ["my name is {}", "I am {}", "I am called {}", "the name is {}", "call me {}"]),
    ("age", "integer", _small_number, ["I am {} years old", "my age is {}", "I turned {}", "aged {}"]),
    ("city", "string", Draw.city, ["I live in {}", "my city is {}", "I come from {}", "my home is in {}"]),
    ("friend", "string", Draw.name, ["my friend is {}", "I have a friend called {}", "my friend is called {}"]),
    ("pet", "string", Draw.word, ["my pet is a {}", "I have a {} at home", "I keep a {}"]),
    ("count", "integer", _small_number, ["I have {} of them", "there are {}", "I counted {}"]),
]


def _schema(draw: Draw, fields: list[tuple[str, str]]) -> str:
    """A real JSON schema, or the shorthand that people write."""
    if draw.chance(0.3):
        return "{" + ", ".join(f'"{name}": {kind}' for name, kind in fields) + "}"
    schema: dict[str, Any] = {"type": "object", "properties": {name: {"type": kind} for name, kind in fields}}
    if draw.chance(0.7):
        schema["required"] = [name for name, _ in fields]
    if draw.chance(0.2):
        schema["additionalProperties"] = False
    return to_json(schema)
