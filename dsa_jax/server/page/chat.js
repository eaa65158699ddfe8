"use strict";
// Whatever a model or a user writes reaches the page through text nodes alone: none of it is ever read as HTML.

const element = (id) => document.getElementById(id);
const messages = []; // the conversation, as it is sent
let key = ""; // in memory only
let model = "";
let running = null; // the AbortController of the answer that is coming

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key) found["Authorization"] = "Bearer " + key;
  return found;
}

function showProblem(text) {
  element("problem").textContent = text;
  element("problem").hidden = !text;
}

function add(parent, kind, className) {
  const made = document.createElement(kind);
  made.className = className;
  parent.append(made);
  return made;
}

function showMessage(role, text) {
  const article = add(element("messages"), "article", role);
  add(article, "b", "").textContent = role === "user" ? "You" : model;
  const parts = {};
  for (const name of ["reasoning", "content", "calls"]) parts[name] = add(article, "div", name);
  parts.content.textContent = text;
  article.scrollIntoView({ block: "end" });
  return parts;
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "the server has answered " + response.status;
  }
}

async function checked(path, options) {
  const response = await fetch(path, options);
  if (response.status === 401) element("key-form").hidden = false;
  if (!response.ok) throw new Error(await problemOf(response));
  return response;
}

async function learnModel() {
  try {
    const response = await checked("/v1/models", { headers: headers() });
    model = (await response.json()).data[0].id;
    element("model").textContent = document.title = model;
    element("key-form").hidden = true;
    showProblem("");
  } catch (error) {
    showProblem(error.message);
  }
}

function body() {
  const system = element("system").value.trim();
  const thinking = element("thinking").checked;
  return JSON.stringify({
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number(element("temperature").value),
    max_tokens: Number(element("tokens").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(thinking ? { chat_template_kwargs: { thinking: true } } : {}),
  });
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function takeCalls(calls, deltas) {
  for (const delta of deltas) {
    calls[delta.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
    const call = calls[delta.index];
    call.id += delta.id ?? "";
    call.function.name += delta.function?.name ?? "";
    call.function.arguments += delta.function?.arguments ?? "";
  }
  return calls.map((call) => call.function.name + "(" + call.function.arguments + ")").join("\n");
}

async function answer(parts, answered) {
  const begin = performance.now();
  const options = { method: "POST", headers: headers(), body: body(), signal: running.signal };
  const calls = [];
  for await (const event of eventsOf(await checked("/v1/chat/completions", options))) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) {
      const rate = event.usage.completion_tokens / ((performance.now() - begin) / 1000);
      element("status").textContent = `${event.usage.total_tokens} tokens, ${rate.toFixed(1)} tokens/s`;
    }
    const delta = event.choices[0]?.delta ?? {};
    if (delta.content) {
      answered.content += delta.content;
      parts.content.append(delta.content);
    }
    if (delta.reasoning_content) {
      answered.reasoning_content = (answered.reasoning_content ?? "") + delta.reasoning_content;
      parts.reasoning.append(delta.reasoning_content);
    }
    if (delta.tool_calls) parts.calls.textContent = takeCalls(calls, delta.tool_calls);
    element("messages").scrollTop = element("messages").scrollHeight;
  }
}

function showRunning(is) {
  element("send").hidden = is;
  element("stop").hidden = !is;
}

async function ask(text) {
  showProblem("");
  element("status").textContent = "";
  messages.push({ role: "user", content: text });
  showMessage("user", text);
  const parts = showMessage("assistant", "");
  const answered = { role: "assistant", content: "" };
  const conversation = running = new AbortController();
  showRunning(true);
  try {
    await answer(parts, answered);
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error.message);
  }
  if (running !== conversation) return; // a new conversation has begun
  if (answered.content || answered.reasoning_content) messages.push(answered);
  else messages.pop(); // nothing came: the question may be asked again
  running = null;
  showRunning(false);
}

function reset() {
  running?.abort();
  running = null;
  messages.length = 0;
  element("messages").replaceChildren();
  element("status").textContent = "";
  showProblem("");
  showRunning(false);
}

element("question-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = element("question").value;
  if (running || !text.trim()) return;
  element("question").value = "";
  ask(text);
});
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("question-form").requestSubmit();
  }
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = element("key").value.trim();
  element("key").value = "";
  learnModel();
});
element("stop").addEventListener("click", () => running?.abort());
element("reset").addEventListener("click", reset);
learnModel();
