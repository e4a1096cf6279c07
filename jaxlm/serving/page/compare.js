// One prompt for two models, which run one after the other so that neither slows the other down.

import { write } from "./api.js";
import { Turn, bytes, make } from "./dom.js";

export function compare(models) {
  const panel = document.getElementById("compare");
  const [form, status, table, button] = ["form", "[data-status]", "tbody", "[data-run]"].map((each) => panel.querySelector(each));
  const sides = [...panel.querySelectorAll("[data-side]")].map((side) => ({ select: side.querySelector("select"), sheet: side.querySelector(".sheet"), text: "" }));
  const turn = new Turn();

  const model = (side) => models.get(side.select.value);

  // By default the second model is a smaller copy of the first, if there is one.
  function choose() {
    const all = [...models.values()].filter((each) => each.kind === "decoder").sort((a, b) => b.bytes_in_memory - a.bytes_in_memory);
    if (!all.length) return;
    sides[0].select.value = all[0].id;
    sides[1].select.value = (all.find((each) => each.recipe) ?? all[1] ?? all[0]).id;
    draw();
  }

  function ratio(first, second, less) {
    if (!first || !second) return make("td", {}, "");
    const times = second / first;
    const better = Math.abs(times - 1) > 0.02 && (less ? times < 1 : times > 1);
    return make("td", { className: better ? "better" : "" }, `${times.toFixed(2)}×`);
  }

  function row(name, of, show, less) {
    const [a, b] = sides.map((side) => of(side));
    const cell = (value) => make("td", {}, value === undefined || value === null ? "–" : show(value));
    return make("tr", {}, make("th", { scope: "row" }, name), cell(a), cell(b), less === undefined ? make("td", {}, "") : ratio(a, b, less));
  }

  function draw() {
    if (!model(sides[0])) return;
    table.replaceChildren(
      row("Compressed by", (side) => model(side).recipe ?? "nothing", (x) => x),
      row("Parameters", (side) => model(side).parameters, (x) => x.toLocaleString()),
      row("Bytes in memory", (side) => model(side).bytes_in_memory, bytes, true),
      row("Tokens a second", (side) => side.speed, (x) => x.toLocaleString(undefined, { maximumFractionDigits: 1 }), false),
      row("Time to the first token", (side) => side.first, (x) => `${x.toFixed(2)} s`, true),
      row("Tokens generated", (side) => side.tokens, (x) => x.toLocaleString()),
    );
  }

  // Underlines where the second text differs from the first.
  function mark() {
    const [a, b] = sides.map((side) => side.text);
    let at = 0;
    while (at < Math.min(a.length, b.length) && a[at] === b[at]) at++;
    if (at < Math.max(a.length, b.length)) {
      for (const side of sides) side.sheet.replaceChildren(side.text.slice(0, at), make("mark", {}, side.text.slice(at)));
    }
    const shared = at === Math.max(a.length, b.length) ? "Both texts are the same." : `The first ${at.toLocaleString()} characters are the same; what differs is underlined.`;
    status.textContent = shared;
  }

  async function one(side, signal) {
    const prompt = panel.querySelector("#prompt").value;
    side.sheet.classList.add("writing");
    const begin = performance.now();
    let first = 0;
    let last = 0;
    const usage = await write({
      model: side.select.value, prompt, signal, temperature: 0,
      max_tokens: Number(panel.querySelector("[data-tokens]").value),
    }, (text) => {
      last = performance.now();
      first ||= last;
      side.text += text;
      side.sheet.append(text);
    }).finally(() => side.sheet.classList.remove("writing"));
    side.tokens = usage.completion_tokens;
    side.first = first ? (first - begin) / 1000 : null;
    side.speed = last > first && side.tokens > 1 ? (side.tokens - 1) / ((last - first) / 1000) : null;
    draw();
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (turn.busy) return turn.stop();
    for (const side of sides) {
      Object.assign(side, { text: "", tokens: null, first: null, speed: null });
      side.sheet.replaceChildren();
    }
    draw();
    button.textContent = "Stop";
    status.textContent = "";
    await turn.run(async (signal) => {
      for (const side of sides) {
        status.textContent = `${side.select.value} writes …`;
        await one(side, signal);
      }
      mark();
    });
    if (status.textContent.endsWith("…")) status.textContent = "";
    button.textContent = "Compare";
  });
  for (const side of sides) {
    side.select.addEventListener("change", () => {
      Object.assign(side, { text: "", tokens: null, first: null, speed: null });
      side.sheet.replaceChildren();
      draw();
    });
  }
  choose();
}
