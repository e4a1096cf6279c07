// Inspection: the most likely next tokens, the tokens that make one likely, and attention.

import { json } from "./api.js";
import { Turn, make, percent, signed, visible } from "./dom.js";
import { heat, shade } from "./heat.js";

const NAMES = { self: "of the text", encoder: "of the source", cross: "from translation to source" };
const SHOWN = 0.005; // weights that are worth a word

export function inside(models) {
  const panel = document.getElementById("inside");
  const find = (name) => panel.querySelector(name);
  const [select, form, status, found] = ["[data-models]", "form", "[data-status]", "[data-found]"].map(find);
  const [kinds, layer, heads, map] = ["[data-kind]", "[data-layer]", ".heads", "[data-map]"].map(find);
  const turn = new Turn();
  const state = { token: null, head: 0, from: null, answer: null };

  function choose() {
    const model = models.get(select.value);
    find("[data-target]").hidden = model?.kind !== "seq2seq";
    layer.max = model?.layers ?? 1;
    layer.value = layer.max;
    kinds.replaceChildren();
    found.hidden = true;
  }

  function look() {
    const body = { model: select.value, text: find("#look").value, method: find("[data-method]").value, layer: Number(layer.value) - 1 };
    if (models.get(select.value).kind === "seq2seq") body.target = find("#look-target").value;
    if (state.token !== null) body.token = state.token;
    return turn.run(async (signal) => {
      status.textContent = "Looking …";
      try {
        state.answer = await json("/v1/inspect", body, signal);
      } finally {
        status.textContent = "";
      }
      found.hidden = false;
      draw();
    });
  }

  function draw() {
    drawNext();
    drawScores();
    const named = state.answer.attention.map((each) => each.kind);
    const kept = named.includes(kinds.value) ? kinds.value : named.at(-1);
    kinds.replaceChildren(...named.map((kind) => new Option(NAMES[kind], kind)));
    kinds.value = kept;
    find("[data-kinds]").hidden = named.length < 2;
    drawAttention();
  }

  function drawNext() {
    const { next, attribution } = state.answer;
    find("[data-next]").replaceChildren(...next.map((each) => {
      const fill = make("span", { className: "fill" });
      fill.style.width = `${100 * each.probability}%`;
      const share = percent(each.probability);
      const button = make("button", { type: "button", aria: { pressed: each.id === attribution.token.id, label: `${each.text || "empty"}, ${share}` } },
        make("span", { className: "text" }, visible(each.text)), make("span", { className: "track" }, fill), make("span", { className: "number" }, share));
      button.addEventListener("click", async () => {
        state.token = each.id;
        await look();
        find("[data-next] [aria-pressed=true]")?.focus();
      });
      return make("li", {}, button);
    }));
  }

  function drawScores() {
    const { attribution } = state.answer;
    const { tokens, scores, total, token, method } = attribution;
    const largest = Math.max(...scores.map(Math.abs), 1e-9);
    const source = state.answer.attention.find((each) => each.kind === "encoder")?.rows.length;
    find("[data-token]").textContent = visible(token.text);
    const sum = scores.reduce((a, b) => a + b, 0);
    find("[data-total]").textContent = `In nats of its log-probability, relative to a text of average tokens (${signed(total)} in total`
      + (method === "integrated_gradients" ? `; the tokens add up to ${signed(sum)}).` : ").");
    const parts = tokens.map((text, i) => {
      const part = make("span", { title: signed(scores[i], 3) }, visible(text));
      shade(part, scores[i] / largest);
      return part;
    });
    if (source) parts.splice(source, 0, make("span", { className: "break" }));
    find("[data-scores]").replaceChildren(...parts);
    find("[data-score-table]").replaceChildren(
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Token"), make("th", { scope: "col" }, "Nats"))),
      make("tbody", {}, ...tokens.map((text, i) => make("tr", {}, make("th", { scope: "row" }, visible(text)), make("td", {}, signed(scores[i], 3))))));
  }

  const attention = () => state.answer.attention.find((each) => each.kind === kinds.value);

  function drawAttention() {
    const { weights, rows, layer: at } = attention();
    find("[data-layer-shown]").textContent = `${at + 1} of ${attention().layers}`;
    state.head = Math.min(state.head, weights.length - 1);
    heads.replaceChildren(...weights.map((head, i) => {
      const canvas = make("canvas");
      heat(canvas, head, 1);
      const button = make("button", { type: "button", aria: { pressed: i === state.head, label: `Head ${i + 1}` } }, canvas, String(i + 1));
      button.addEventListener("click", () => {
        state.head = i;
        drawAttention();
        heads.children[i].focus();
      });
      return button;
    }));
    if (state.from === null || state.from >= rows.length) state.from = rows.length - 1;
    drawMap();
  }

  function drawMap() {
    const { weights, rows, columns, kind, layer: at } = attention();
    const head = weights[state.head];
    heat(map, head, 2, rows.map(visible), columns.map(visible), state.from);
    map.setAttribute("aria-label", `Attention ${NAMES[kind]}, layer ${at + 1}, head ${state.head + 1}: ${rows.length} tokens attend to ${columns.length}`);
    find("[data-from]").replaceChildren(...rows.map((text, i) => {
      const button = make("button", { type: "button", aria: { pressed: i === state.from } }, visible(text));
      button.addEventListener("click", () => {
        state.from = i;
        drawMap();
        find("[data-from]").children[i].focus();
      });
      return button;
    }));
    const row = head[state.from];
    const best = row.map((weight, i) => [weight, i]).filter(([weight]) => weight > SHOWN).sort((a, b) => b[0] - a[0]).slice(0, 3);
    find("[data-looks]").textContent = `${visible(rows[state.from])} attends to ${best.map(([weight, i]) => `${visible(columns[i])} (${percent(weight)})`).join(", ")}.`;
    const largest = Math.max(...row);
    find("[data-to]").replaceChildren(...columns.map((text, i) => {
      const part = make("span", { title: percent(row[i]) }, visible(text));
      shade(part, row[i] / largest);
      return part;
    }));
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    Object.assign(state, { token: null, from: null });
    look();
  });
  select.addEventListener("change", choose);
  find("[data-method]").addEventListener("change", () => { if (!found.hidden) look(); });
  layer.addEventListener("change", () => { if (!found.hidden) look(); });
  kinds.addEventListener("change", () => { state.from = null; drawAttention(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (state.answer) draw(); });
  choose();
}
