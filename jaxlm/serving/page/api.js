// Requests to the server: JSON responses or event streams, with the API key if the server requires one.

const KEY = "jaxlm-key";

export class Failure extends Error {}

function askForKey() {
  const dialog = document.getElementById("key");
  const field = dialog.querySelector("input");
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (field.value) sessionStorage.setItem(KEY, field.value);
      resolve(Boolean(field.value));
    }, { once: true });
  });
}

async function ask(path, body, signal) {
  for (;;) {
    const headers = { "Content-Type": "application/json" };
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    let answer;
    try {
      answer = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server cannot be reached.");
    }
    if (answer.ok) return answer;
    if (answer.status === 401 && await askForKey()) continue;
    const told = await answer.json().catch(() => null);
    throw new Failure(told?.error?.message ?? `The server responded with status ${answer.status}.`);
  }
}

export async function json(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

// The events of a streamed response.
export async function* events(path, body, signal) {
  const answer = await ask(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Failure("The server ended in the middle of a response.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message);
      yield event;
    }
  }
}

// Streams text from a model with or without a chat template; returns the usage.
export async function write({ model, messages, prompt, signal, ...options }, tell) {
  const path = messages ? "/v1/chat/completions" : "/v1/completions";
  const body = messages ? { model, messages, ...options } : { model, prompt, ...options };
  let usage = null;
  for await (const event of events(path, body, signal)) {
    usage = event.usage ?? usage;
    for (const choice of event.choices) {
      const text = messages ? choice.delta.content : choice.text;
      if (text) tell(text);
    }
  }
  return usage;
}
