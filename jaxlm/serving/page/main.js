// The tabs, and the models that each tab can choose from.

import { json } from "./api.js";
import { complain } from "./dom.js";
import { chat } from "./chat.js";
import { compare } from "./compare.js";
import { inside } from "./inside.js";
import { translate } from "./translate.js";
import { write } from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab, focus) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", chosen);
    each.tabIndex = chosen ? 0 : -1;
    document.getElementById(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (focus) tab.focus();
}

for (const [at, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(tabs[(to + tabs.length) % tabs.length], true);
  });
}

const named = () => tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
window.addEventListener("hashchange", () => show(named() ?? tabs[0]));

async function start() {
  const { data } = await json("/v1/models");
  const models = new Map(data.map((model) => [model.id, model]));
  for (const select of document.querySelectorAll("[data-models]")) {
    const kind = select.dataset.models;
    for (const model of data) {
      if (kind === "any" || model.kind === kind) select.append(new Option(model.id));
    }
  }
  for (const tab of [chat, translate, write, compare, inside]) tab(models);
  const generates = data.some((model) => model.kind === "decoder");
  for (const name of ["chat", "write", "compare"]) document.getElementById(`tab-${name}`).disabled = !generates;
  show(named() ?? tabs[generates ? 0 : 1]);
}

start().catch(complain);
