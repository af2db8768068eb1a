// The scenarios with openai-node, as an application has it: told a scenario's name, it says what came of it.
//
// It knows no major version of the SDK and nothing of Baton. What must come of a scenario stands in
// test_real_clients.py; player.py is the same for openai-python.

import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { VERSION } from "openai/version";
import { z } from "zod";

const COUNT = [{ role: "user", content: "Count from 1 to 12." }];
const WEATHER = [{ role: "user", content: "What is the weather in Paris?" }];
const PERSON = 'My name is Anna. I am 30 years old. Give JSON: {"name": string, "age": integer}';
const REPORT = "sunny, 21 degrees";
const POLL_MS = 50;

const Person = z.object({ name: z.string(), age: z.int() });
const GetWeather = z.object({ city: z.string() });
const Add = z.object({ a: z.int(), b: z.int() });

const [url, lockedUrl, key, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "EMPTY", timeout: 60_000 });
const locked = new OpenAI({ baseURL: lockedUrl, apiKey: key, timeout: 60_000 });

const asks = (more) => ({ model, messages: COUNT, temperature: 0, max_tokens: 64, ...more });
const chat = (more) => client.chat.completions.create(asks(more));
const respond = (input, more) => client.responses.create({ model, input, temperature: 0, ...more });

const weather = (called) =>
  zodFunction({
    name: "get_weather",
    description: "The weather now",
    parameters: GetWeather,
    function: (place) => {
      called.push(place);
      return REPORT;
    },
  });
const tools = () => [weather([]), zodFunction({ name: "add", description: "The sum", parameters: Add })];

const scenarios = {
  // ── chat completions ──

  chat_whole: async () => answered(await chat()),

  async chat_stream() {
    const chunks = await all(await chat({ stream: true, stream_options: { include_usage: true } }));
    const choices = chunks.flatMap((chunk) => chunk.choices);
    return {
      text: choices.map((choice) => choice.delta.content ?? "").join(""),
      finish_reason: choices.at(-1).finish_reason,
      usage: chunks.at(-1).usage,
    };
  },

  async chat_stream_helper() {
    let snapshot;
    const stream = client.chat.completions.stream(asks({ stream_options: { include_usage: true } }));
    stream.on("content", (_, text) => (snapshot = text));
    return { ...answered(await stream.finalChatCompletion()), snapshot };
  },

  async chat_parse() {
    const messages = [{ role: "user", content: PERSON }];
    const form = zodResponseFormat(Person, "person");
    const answer = await client.chat.completions.parse(asks({ messages, response_format: form }));
    return answer.choices[0].message.parsed;
  },

  async chat_abort() {
    const stream = await chat({ stream: true, max_tokens: 1900, ignore_eos: true });
    for await (const chunk of stream) {
      stream.controller.abort();
      return { id: chunk.id };
    }
  },

  async chat_stored() {
    const metadata = { of: `node ${VERSION}` };
    const kept = client.chat.completions;
    const made = await chat({ store: true, metadata });
    const again = await kept.retrieve(made.id);
    const listed = await all(kept.list({ metadata }));
    return {
      is_same: JSON.stringify(answered(again)) === JSON.stringify(answered(made)),
      is_listed: listed.length === 1 && listed[0].id === made.id,
      messages: (await all(kept.messages.list(made.id))).map((message) => message.content),
      metadata: (await kept.update(made.id, { metadata: { of: "nobody" } })).metadata,
      deleted: (await kept.delete(made.id)).deleted,
      then: await refusal(() => kept.retrieve(made.id)),
    };
  },

  // ── tools ──

  tools_run: () => runTools({}),
  tools_run_stream: () => runTools({ stream: true }),

  tool_required: async () =>
    callsOf(await chat({ tools: tools(), tool_choice: "required", parallel_tool_calls: false })),

  async tool_named() {
    const choice = { type: "function", function: { name: "add" } };
    return callsOf(await chat({ tools: tools(), tool_choice: choice, parallel_tool_calls: false }));
  },

  // ── what is refused ──

  async refused() {
    const stranger = locked.withOptions({ apiKey: "wrong" });
    return {
      model: await refusal(() => chat({ model: "gpt-none" })),
      value: await refusal(() => chat({ temperature: 9 })),
      key: await refusal(() => stranger.models.list()),
    };
  },

  // The key may have one answer at once, and a stream is just that; half a second later it is left.
  async retry() {
    let attempts = 0;
    const counting = (...request) => (attempts++, fetch(...request));
    const patient = locked.withOptions({ maxRetries: 5, fetch: counting });
    const stream = await locked.chat.completions.create(asks({ stream: true, max_tokens: 1900, ignore_eos: true }));
    await stream[Symbol.asyncIterator]().next();
    setTimeout(() => stream.controller.abort(), 500);
    const began = performance.now();
    const answer = await patient.chat.completions.create(asks());
    return { ...answered(answer), retries: attempts - 1, waited_s: (performance.now() - began) / 1000 };
  },

  // ── texts and models ──

  async text() {
    const options = { model, prompt: "1, 2, 3, ", max_tokens: 8, temperature: 0 };
    const whole = await client.completions.create(options);
    const chunks = await all(await client.completions.create({ ...options, stream: true }));
    return {
      text: whole.choices[0].text,
      num_tokens: whole.usage.completion_tokens,
      streamed: chunks.map((chunk) => chunk.choices[0].text).join(""),
    };
  },

  models: async () => ({
    listed: (await all(client.models.list())).map((each) => each.id),
    retrieved: (await client.models.retrieve(model)).id,
  }),

  // ── responses ──

  response: async () => told(await respond(COUNT[0].content)),

  async response_stream_helper() {
    const stream = client.responses.stream({ model, input: COUNT[0].content, temperature: 0 });
    const events = await all(stream);
    const deltas = events.filter((event) => event.type === "response.output_text.delta");
    return {
      ...told(await stream.finalResponse()),
      numbers: events.map((event) => event.sequence_number),
      streamed: deltas.map((event) => event.delta).join(""),
    };
  },

  async response_parse() {
    const text = { format: zodTextFormat(Person, "person") };
    return (await client.responses.parse({ model, input: PERSON, temperature: 0, text })).output_parsed;
  },

  async response_background() {
    let response = await respond(COUNT[0].content, { background: true });
    const began = response.status;
    while (["queued", "in_progress"].includes(response.status)) {
      await sleep(POLL_MS);
      response = await client.responses.retrieve(response.id);
    }
    return { ...told(response), began };
  },

  async response_follows() {
    const first = await respond("My name is Anna.");
    const second = await respond("What is my name?", { previous_response_id: first.id });
    const items = await all(client.responses.inputItems.list(second.id, { order: "asc" }));
    return {
      text: second.output_text,
      is_linked: second.previous_response_id === first.id,
      items: items.map((item) => [item.role, item.content[0].text]),
    };
  },

  async response_abort() {
    const more = { max_output_tokens: 1900, ignore_eos: true };
    const stream = client.responses.stream({ model, input: COUNT[0].content, ...more });
    for await (const event of stream) {
      if (event.type === "response.created") return { id: event.response.id };
    }
  },

  async response_deleted() {
    const made = await respond(COUNT[0].content);
    await client.responses.delete(made.id);
    return await refusal(() => client.responses.retrieve(made.id));
  },

  // This SDK has no runner for responses: the loop that its applications write.
  async response_tools() {
    const { $callback, $parseRaw, function: tool } = weather([]);
    const called = [];
    let [input, previous] = [WEATHER, undefined];
    for (;;) {
      const more = { tools: [{ type: "function", ...tool }], previous_response_id: previous };
      const response = await respond(input, more);
      const calls = response.output.filter((item) => item.type === "function_call");
      if (calls.length === 0) return { called, text: response.output_text };
      called.push(...calls.map((call) => JSON.parse(call.arguments)));
      input = calls.map(({ call_id }) => ({ type: "function_call_output", call_id, output: REPORT }));
      previous = response.id;
    }
  },
};

async function runTools(more) {
  const called = [];
  const runner = client.chat.completions.runTools(
    asks({ messages: WEATHER, tools: [weather(called)], ...more }),
  );
  return { text: await runner.finalContent(), called };
}

async function all(source) {
  const items = [];
  for await (const item of source) items.push(item);
  return items;
}

const answered = ({ choices: [choice], usage }) => ({
  text: choice.message.content,
  finish_reason: choice.finish_reason,
  usage,
});

const told = (response) => ({
  status: response.status,
  text: response.output_text,
  num_tokens: response.usage.output_tokens,
});

const callsOf = ({ choices: [choice] }) => ({
  finish_reason: choice.finish_reason,
  calls: choice.message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]),
});

async function refusal(ask) {
  try {
    await ask();
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return [error.constructor.name, error.status, error.code, error.param];
  }
}

async function play(scenario) {
  try {
    return { told: await scenarios[scenario]() };
  } catch (error) {
    return { failed: error.stack };
  }
}

console.log(JSON.stringify({ version: VERSION }));
for await (const scenario of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await play(scenario)));
}
