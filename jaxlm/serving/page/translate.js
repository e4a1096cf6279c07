// A source and its translation: sentences are translated while they are written, each with alternatives from the beam.

import { json } from "./api.js";
import { Turn, copy, make, plural, signed } from "./dom.js";

const PAUSE = 500; // milliseconds without a key before translating
const MOST = 64; // sentences of a request
const BEAM = 5;

// Sentences, and the separators between them.
export function sentences(text) {
  const out = [];
  for (const line of text.split(/(\n)/)) {
    const parts = line === "\n" ? [line] : [...new Intl.Segmenter(undefined, { granularity: "sentence" }).segment(line)].map((each) => each.segment);
    for (const part of parts) {
      const words = part.trimEnd();
      if (words) out.push({ text: words, after: part.slice(words.length) });
      else if (out.length) out.at(-1).after += part;
    }
  }
  return out;
}

export function translate(models) {
  const panel = document.getElementById("translate");
  const [select, source, out, status, others] = ["[data-models]", "#source", "[data-out]", "[data-status]", "[data-others]"]
    .map((each) => panel.querySelector(each));
  const languages = [panel.querySelector("[data-source]"), panel.querySelector("[data-target]")];
  const copying = panel.querySelector("[data-copy]");
  const turn = new Turn();
  let timer = 0;
  let lines = [];

  function choose() {
    const model = models.get(select.value);
    panel.querySelector("[data-none]").hidden = Boolean(model);
    panel.querySelector("[data-all]").hidden = !model;
    panel.querySelector(".bar").hidden = !model;
    const codes = model?.languages ?? [];
    for (const each of panel.querySelectorAll("[data-languages]")) each.hidden = !codes.length;
    for (const each of languages) each.replaceChildren(new Option("the model's default", ""), ...codes.map((code) => new Option(code)));
    if (model?.target_language) languages[1].value = model.target_language;
    run();
  }

  function whole() {
    return lines.map((line) => line.found.text + line.after).join("");
  }

  function draw() {
    out.replaceChildren(...lines.flatMap((line) => [line.button, line.after]));
    copying.disabled = !lines.length;
  }

  function show(line) {
    for (const each of lines) each.button.setAttribute("aria-pressed", each === line);
    panel.querySelector("[data-of]").textContent = line.text;
    const found = line.all.filter((each) => each !== line.found);
    others.querySelector("ul").replaceChildren(...found.map((each) => {
      const button = make("button", { type: "button" }, make("span", {}, each.text), make("span", { className: "muted", title: "score: log-probability over length" }, signed(each.score)));
      button.addEventListener("click", () => {
        line.found = each;
        line.button.textContent = each.text;
        show(line);
        line.button.focus();
      });
      return make("li", {}, button);
    }));
    if (!found.length) others.querySelector("ul").replaceChildren(make("li", { className: "muted" }, "The beam found no other translation."));
    others.hidden = false;
  }

  function run() {
    const parts = sentences(source.value);
    others.hidden = true;
    if (!parts.length || !select.value) {
      turn.stop();
      lines = [];
      draw();
      status.textContent = "";
      return;
    }
    turn.run(async (signal) => {
      status.textContent = "Translating …";
      const started = performance.now();
      const found = [];
      try {
        for (let at = 0; at < parts.length; at += MOST) {
          const body = { model: select.value, text: parts.slice(at, at + MOST).map((each) => each.text), beam: BEAM, alternatives: BEAM - 1 };
          if (languages[0].value) body.source_language = languages[0].value;
          if (languages[1].value) body.target_language = languages[1].value;
          found.push(...(await json("/v1/translate", body, signal)).translations);
        }
      } catch (error) {
        status.textContent = "";
        throw error;
      }
      lines = parts.map((part, i) => {
        const line = { ...part, found: found[i], all: [found[i], ...found[i].alternatives] };
        line.button = make("button", { type: "button", className: "line", title: "Show other translations", aria: { pressed: false } }, found[i].text);
        line.button.addEventListener("click", () => show(line));
        return line;
      });
      draw();
      status.textContent = `${plural(parts.length, "sentence")} in ${((performance.now() - started) / 1000).toFixed(1)} s; choose one to see alternatives`;
    });
  }

  source.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(run, PAUSE);
  });
  source.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  });
  for (const each of languages) each.addEventListener("change", run);
  select.addEventListener("change", choose);
  copying.addEventListener("click", () => copy(whole(), copying));
  choose();
}
