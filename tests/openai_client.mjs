// What the openai package for Node gets from a server: node openai_client.mjs URL, JSON on stdout.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "default_model";
const messages = [{ role: "user", content: "Name three colours." }];
const chat = (more) => client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0, ...more });
const tools = [{ type: "function", function: { name: "weather", description: "The weather.",
  parameters: { type: "object", properties: { city: { type: "string" } } } } }];

async function streamed(more) {
  const seen = { text: "", finish: null, usage: null };
  for await (const event of await chat({ stream: true, ...more })) {
    for (const choice of event.choices) {
      seen.text += choice.delta.content ?? "";
      seen.finish = choice.finish_reason ?? seen.finish;
    }
    seen.usage = event.usage ?? seen.usage;
  }
  return seen;
}

const results = {};
results.models = (await client.models.list()).data.length > 0;
const whole = await chat({});
results.chat = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens];
results.stream = await streamed({ stream_options: { include_usage: true } });
results.tools = (await chat({ tools, tool_choice: "auto" })).choices[0].message;
results.logprobs = (await chat({ logprobs: true, top_logprobs: 2, max_tokens: 3 })).choices[0].logprobs;
results.seed = (await chat({ seed: 3, temperature: 0.9 })).choices[0].message.content;
results.stop = (await chat({ stop: ["e"] })).choices[0].message.content;
const text = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 9, temperature: 0 });
results.completion = [text.choices[0].text, text.usage.completion_tokens];
try {
  await chat({ temperature: -1 });
} catch (e) {
  results.error = e.status;
}
console.log(JSON.stringify(results));
