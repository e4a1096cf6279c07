// An editor: the proposals of the model are shown as changes, each of which is accepted or rejected.

import { write as ask } from "./api.js";
import { diff } from "./diff.js";
import { Turn, make, plural } from "./dom.js";

const ORDERS = {
  continue: { order: "Continue the text. Reply with the continuation only." },
  rewrite: { order: "Rewrite the text in other words. Reply with the new text only.", label: "The same in other words" },
  shorten: { order: "Say the same in fewer words. Reply with the new text only.", label: "The same in fewer words" },
};

export function write(models) {
  const panel = document.getElementById("write");
  const [select, field, status, stop] = ["select", "#text", "[data-editing] [data-status]", "[data-stop]"].map((each) => panel.querySelector(each));
  const [editing, reviewing, sheet, left] = ["[data-editing]", "[data-reviewing]", "[data-diff]", "[data-left]"].map((each) => panel.querySelector(each));
  const buttons = [...panel.querySelectorAll("[data-do]")];
  const turn = new Turn();
  let parts = [];

  // A model without a chat template gets a text whose continuation is the answer.
  function request(what, text) {
    const { order, label } = ORDERS[what];
    if (models.get(select.value).chat) return { messages: [{ role: "user", content: `${order}\n\n${text}` }] };
    return what === "continue" ? { prompt: text } : { prompt: `"${text.trim()}"\n\n${label}: "`, stop: '"' };
  }

  async function propose(what) {
    const text = field.value;
    let [begin, end] = [field.selectionStart, field.selectionEnd];
    if (what === "continue") [begin, end] = [0, begin === end && end ? end : text.length];
    else if (begin === end) [begin, end] = [0, text.length];
    const chosen = text.slice(begin, end);
    if (!chosen.trim()) {
      status.textContent = "Write something first.";
      return;
    }
    for (const each of buttons) each.disabled = true;
    stop.hidden = false;
    let found = "";
    const work = turn.run(async (signal) => {
      await ask({
        model: select.value, ...request(what, chosen), signal, temperature: 0.7,
        max_tokens: Number(panel.querySelector("[data-tokens]").value),
      }, (piece) => {
        found += piece;
        status.textContent = `${plural(found.trim().split(/\s+/).length, "word")} …`;
      });
    });
    await work;
    for (const each of buttons) each.disabled = false;
    stop.hidden = true;
    status.textContent = "";
    if (!found.trim()) {
      if (document.getElementById("notice").hidden) status.textContent = "The model proposes no change.";
      return;
    }
    const change = what === "continue" ? [{ text: chosen }, { cut: "", add: found }] : diff(chosen, found.trim());
    parts = [{ text: text.slice(0, begin) }, ...change, { text: text.slice(end) }];
    review();
  }

  const open = () => parts.filter((part) => part.text === undefined && part.kept === undefined);

  function review() {
    editing.hidden = true;
    reviewing.hidden = false;
    draw();
    if (open().length) panel.querySelector("#review-label").focus();
  }

  function draw() {
    if (!open().length) return finish();
    left.textContent = `${plural(open().length, "change")} left`;
    sheet.replaceChildren(...parts.map((part) => {
      if (part.text !== undefined) return part.text;
      if (part.kept !== undefined) return part.kept ? part.add : part.cut;
      const said = [part.cut.trim() && `remove “${part.cut.trim()}”`, part.add.trim() && `insert “${part.add.trim()}”`].filter(Boolean).join(", ");
      return make("span", { className: "change" },
        ...(part.cut ? [make("del", {}, part.cut)] : []), ...(part.add ? [make("ins", {}, part.add)] : []),
        make("button", { type: "button", title: "Accept", aria: { label: `Accept: ${said}` }, onclick: () => decide(part, true) }, "✓"),
        make("button", { type: "button", title: "Reject", aria: { label: `Reject: ${said}` }, onclick: () => decide(part, false) }, "✗"));
    }));
  }

  function decide(part, kept) {
    const at = open().indexOf(part);
    part.kept = kept;
    draw();
    sheet.querySelectorAll(".change")[Math.min(at, open().length - 1)]?.querySelector("button").focus();
  }

  function finish() {
    field.value = parts.map((part) => part.text ?? (part.kept ? part.add : part.cut)).join("");
    reviewing.hidden = true;
    editing.hidden = false;
    field.focus();
    const end = field.value.length - parts.at(-1).text.length;
    field.setSelectionRange(end, end);
  }

  for (const each of buttons) each.addEventListener("click", () => propose(each.dataset.do));
  stop.addEventListener("click", () => turn.stop());
  for (const each of panel.querySelectorAll("[data-all]")) {
    each.addEventListener("click", () => {
      for (const part of open()) part.kept = each.dataset.all === "true";
      draw();
    });
  }
}
