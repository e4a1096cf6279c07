// A conversation. A model without a chat template continues it as plain text.

import { write } from "./api.js";
import { Turn, copy, make } from "./dom.js";

export function chat(models) {
  const panel = document.getElementById("chat");
  const [select, list, form, hint] = ["select", ".talk", "form", "[data-hint]"].map((each) => panel.querySelector(each));
  const [field, send] = [form.querySelector("textarea"), form.querySelector("[data-send]")];
  const turn = new Turn();
  let messages = [];

  const model = () => models.get(select.value);

  function begin() {
    turn.stop();
    messages = [];
    const said = model()?.chat
      ? "Ask something. The answer appears while it is generated."
      : "Begin a text. The model continues it.";
    list.replaceChildren(make("li", { className: "begin" }, make("p", {}, said)));
    hint.textContent = model()?.chat === false
      ? `${select.value} has no chat template: it was not trained to answer, and continues the text instead.` : "";
    hint.hidden = !hint.textContent;
    field.placeholder = model()?.chat ? "Write a message" : "Write the beginning of a text";
    label();
  }

  function label() {
    send.textContent = turn.busy ? "Stop" : "Send";
  }

  function add(role, content) {
    const who = role === "user" ? "You" : select.value;
    const said = make("div", { className: "said" }, content);
    const item = make("li", { className: role === "user" ? "user" : "assistant" }, make("span", { className: "who" }, who), said);
    list.querySelector(".begin")?.remove();
    list.append(item);
    item.scrollIntoView({ block: "end" });
    return { item, said };
  }

  async function answer() {
    const { item, said } = add("assistant", "");
    item.setAttribute("aria-busy", "true");
    const message = { role: "assistant", content: "" };
    messages.push(message);
    const before = messages.slice(0, -1);
    const input = model().chat ? { messages: before } : { prompt: before.map((each) => each.content).join("") };
    const started = performance.now();
    let usage = null;
    const work = turn.run(async (signal) => {
      usage = await write({
        model: select.value, ...input, signal,
        temperature: Number(panel.querySelector("[data-temperature]").value),
        max_tokens: Number(panel.querySelector("[data-tokens]").value),
      }, (text) => {
        const piece = message.content || !model().chat ? text : text.trimStart();
        message.content += piece;
        said.append(piece);
        if (innerHeight + scrollY > document.body.scrollHeight - 160) scrollTo(0, document.body.scrollHeight);
      });
    });
    label();
    await work;
    label();
    item.removeAttribute("aria-busy");
    if (!messages.includes(message)) return;
    const seconds = (performance.now() - started) / 1000;
    const acts = make("div", { className: "acts" },
      make("button", { type: "button", className: "quiet", onclick: (event) => copy(message.content, event.target) }, "Copy"),
      make("button", { type: "button", className: "quiet", onclick: () => again(message, item) }, "Try again"));
    if (usage) acts.append(make("span", { className: "muted" }, `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`));
    item.append(acts);
    item.scrollIntoView({ block: "nearest" });
  }

  function again(message, item) {
    turn.stop();
    messages.splice(messages.indexOf(message));
    while (item.nextSibling) item.nextSibling.remove();
    item.remove();
    answer();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (turn.busy) {
      turn.stop();
      return label();
    }
    const text = field.value;
    if (!text.trim()) return;
    field.value = "";
    const content = model().chat ? text.trim() : (messages.length ? "\n" : "") + text;
    messages.push({ role: "user", content });
    add("user", text.trim());
    answer();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!turn.busy) form.requestSubmit();
  });
  select.addEventListener("change", begin);
  panel.querySelector("[data-clear]").addEventListener("click", () => { begin(); field.focus(); });
  begin();
}
