"""The scenarios with openai-python, as an application has it: told a scenario's name, it says what came of it.

It knows no major version of the SDK and nothing of Baton, of which it needs no module: another environment's Python
runs it. What must come of a scenario stands in test_real_clients.py; player.mjs is the same for openai-node.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from importlib.util import find_spec
from typing import Any

import openai
from pydantic import BaseModel

COUNT: Any = [{"role": "user", "content": "Count from 1 to 12."}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON = 'My name is Anna. I am 30 years old. Give JSON: {"name": string, "age": integer}'
REPORT = "sunny, 21 degrees"
POLL_S = 0.05


class Person(BaseModel):
    name: str
    age: int


class GetWeather(BaseModel):
    city: str


class Add(BaseModel):
    a: int
    b: int


TOOLS: Any = [openai.pydantic_function_tool(GetWeather, name="get_weather", description="The weather now"),
              openai.pydantic_function_tool(Add, name="add", description="The sum")]
RESPONSES_TOOL: Any = {"type": "function", **TOOLS[0]["function"]}


class Player:
    def __init__(self, url: str, locked_url: str, key: str, model: str) -> None:
        self.client = openai.OpenAI(base_url=url, api_key="EMPTY", timeout=60)
        self.locked = openai.OpenAI(base_url=locked_url, api_key=key, timeout=60)
        self.model: Any = model

    def chat(self, messages: Any = COUNT, **options: Any) -> Any:
        return self.client.chat.completions.create(
            **{"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 64} | options)

    def respond(self, said: Any = COUNT[0]["content"], **options: Any) -> Any:
        return self.client.responses.create(model=self.model, input=said, temperature=0, **options)

    # ── chat completions ──

    def chat_whole(self) -> Any:
        return answered(self.chat())

    def chat_stream(self) -> Any:
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        return {"text": "".join(choice.delta.content or "" for choice in choices),
                "finish_reason": choices[-1].finish_reason, "usage": chunks[-1].usage.to_dict()}

    def chat_stream_helper(self) -> Any:
        snapshots = []
        with self.client.chat.completions.stream(model=self.model, messages=COUNT, temperature=0, max_tokens=64,
                                                 stream_options={"include_usage": True}) as stream:
            for event in stream:
                snapshots += [event.snapshot] if event.type == "content.delta" else []
            return answered(stream.get_final_completion()) | {"snapshot": snapshots[-1]}

    def chat_parse(self) -> Any:
        answer = self.client.chat.completions.parse(
            model=self.model, messages=[{"role": "user", "content": PERSON}], temperature=0, max_tokens=64,
            response_format=Person)
        return parsed(answer.choices[0].message.parsed)

    def chat_abort(self) -> Any:
        stream = self.chat(stream=True, max_tokens=1900, extra_body={"ignore_eos": True})
        completion_id = next(iter(stream)).id
        stream.close()
        return {"id": completion_id}

    def chat_stored(self) -> Any:
        made = self.chat(store=True, metadata={"of": f"python {openai.__version__}"})
        kept = self.client.chat.completions
        listed = [each.id for each in kept.list(metadata={"of": f"python {openai.__version__}"})]
        told = {"is_same": answered(kept.retrieve(made.id)) == answered(made), "is_listed": listed == [made.id],
                "messages": [message.content for message in kept.messages.list(made.id)],
                "metadata": kept.update(made.id, metadata={"of": "nobody"}).metadata,
                "deleted": kept.delete(made.id).deleted}
        return told | {"then": refusal(lambda: kept.retrieve(made.id))}

    # ── tools ──

    def tools_run(self) -> Any:
        return self._run_tools(lambda messages: self.client.chat.completions.parse(
            model=self.model, messages=messages, tools=TOOLS[:1], temperature=0).choices[0].message)

    def tools_run_stream(self) -> Any:
        def ask(messages: Any) -> Any:
            with self.client.chat.completions.stream(model=self.model, messages=messages, tools=TOOLS[:1],
                                                     temperature=0) as stream:
                return stream.get_final_completion().choices[0].message

        return self._run_tools(ask)

    def _run_tools(self, ask: Any) -> Any:
        """This SDK has no runner for chats: the loop that its applications write."""
        messages, called = list(WEATHER), []
        while calls := (message := ask(messages)).tool_calls:
            messages.append(message)
            for call in calls:
                called.append(call.function.parsed_arguments.model_dump())
                messages.append({"role": "tool", "tool_call_id": call.id, "content": REPORT})
        return {"called": called, "text": message.content}

    def tool_required(self) -> Any:
        return calls_of(self.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False))

    def tool_named(self) -> Any:
        choice = {"type": "function", "function": {"name": "add"}}
        return calls_of(self.chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False))

    # ── what is refused ──

    def refused(self) -> Any:
        stranger = self.locked.with_options(api_key="wrong")
        return {"model": refusal(lambda: self.chat(model="gpt-none")),
                "value": refusal(lambda: self.chat(temperature=9)),
                "key": refusal(lambda: stranger.models.list())}

    def retry(self) -> Any:
        """The key may have one answer at once, and a stream is just that; half a second later it is left."""
        options: Any = {"model": self.model, "messages": COUNT, "temperature": 0, "max_tokens": 64}
        stream: Any = self.locked.chat.completions.create(**options | {"max_tokens": 1900}, stream=True,
                                                          extra_body={"ignore_eos": True})
        next(stream)
        threading.Timer(0.5, stream.close).start()
        began_s = time.monotonic()
        raw = self.locked.with_options(max_retries=5).chat.completions.with_raw_response.create(**options)
        return answered(raw.parse()) | {"retries": raw.retries_taken, "waited_s": time.monotonic() - began_s}

    # ── texts and models ──

    def text(self) -> Any:
        options: Any = {"model": self.model, "prompt": "1, 2, 3, ", "max_tokens": 8, "temperature": 0}
        whole = self.client.completions.create(**options)
        chunks = list(self.client.completions.create(**options, stream=True))
        return {"text": whole.choices[0].text, "num_tokens": whole.usage and whole.usage.completion_tokens,
                "streamed": "".join(chunk.choices[0].text for chunk in chunks)}

    def models(self) -> Any:
        return {"listed": [model.id for model in self.client.models.list()],
                "retrieved": self.client.models.retrieve(self.model).id}

    # ── responses ──

    def response(self) -> Any:
        return told(self.respond())

    def response_stream_helper(self) -> Any:
        with self.client.responses.stream(model=self.model, input=COUNT[0]["content"], temperature=0) as stream:
            events: list[Any] = list(stream)
            final = stream.get_final_response()
        return told(final) | {"numbers": [event.sequence_number for event in events], "streamed": "".join(
            event.delta for event in events if event.type == "response.output_text.delta")}

    def response_parse(self) -> Any:
        answer = self.client.responses.parse(model=self.model, input=PERSON, temperature=0, text_format=Person)
        return parsed(answer.output_parsed)

    def response_background(self) -> Any:
        response = self.respond(background=True)
        began = response.status
        while response.status in ("queued", "in_progress"):
            time.sleep(POLL_S)
            response = self.client.responses.retrieve(response.id)
        return told(response) | {"began": began}

    def response_follows(self) -> Any:
        first = self.respond("My name is Anna.")
        second = self.respond("What is my name?", previous_response_id=first.id)
        items: Any = self.client.responses.input_items.list(second.id, order="asc")
        return {"text": second.output_text, "is_linked": second.previous_response_id == first.id,
                "items": [[item.role, item.content[0].text] for item in items]}

    def response_abort(self) -> Any:
        with self.client.responses.stream(model=self.model, input=COUNT[0]["content"], max_output_tokens=1900,
                                          extra_body={"ignore_eos": True}) as stream:
            for event in stream:
                if event.type == "response.created":
                    return {"id": event.response.id}

    def response_deleted(self) -> Any:
        made = self.respond()
        self.client.responses.delete(made.id)
        return refusal(lambda: self.client.responses.retrieve(made.id))

    def response_tools(self) -> Any:
        if find_spec("openai.lib.responses_tool_runner"):
            return self._respond_by_runner()
        called, said, previous = [], WEATHER, None
        while True:
            response = self.respond(said, tools=[RESPONSES_TOOL], previous_response_id=previous)
            calls = [item for item in response.output if item.type == "function_call"]
            called += [json.loads(call.arguments) for call in calls]
            if not calls:
                return {"called": called, "text": response.output_text}
            said = [{"type": "function_call_output", "call_id": call.call_id, "output": REPORT} for call in calls]
            previous = response.id

    def _respond_by_runner(self) -> Any:
        from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner

        called: list[Any] = []

        def execute(arguments: dict[str, object]) -> str:
            called.append(arguments)
            return REPORT

        runner = ResponsesToolRunner(functions=[RegisteredFunction(RESPONSES_TOOL, execute)])
        response = runner.run(self.client, {"model": self.model, "input": WEATHER, "temperature": 0})
        return {"called": called, "text": response.output_text}


def answered(completion: Any) -> dict[str, Any]:
    (choice,) = completion.choices
    return {"text": choice.message.content, "finish_reason": choice.finish_reason, "usage": completion.usage.to_dict()}


def told(response: Any) -> dict[str, Any]:
    return {"status": response.status, "text": response.output_text, "num_tokens": response.usage.output_tokens}


def parsed(person: Person | None) -> Any:
    return person and person.model_dump()


def calls_of(completion: Any) -> Any:
    (choice,) = completion.choices
    return {"finish_reason": choice.finish_reason, "calls": [
        [call.function.name, json.loads(call.function.arguments)] for call in choice.message.tool_calls]}


def refusal(ask: Any) -> Any:
    try:
        ask()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param]


def play(player: Player, scenario: str) -> dict[str, Any]:
    try:
        return {"told": getattr(player, scenario)()}
    except Exception:
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    player = Player(*sys.argv[1:])
    print(json.dumps({"version": openai.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(play(player, line.strip())), flush=True)
