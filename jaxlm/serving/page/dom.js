// Helpers that every tab uses.

export function make(tag, properties = {}, ...children) {
  const { dataset, aria, ...others } = properties;
  const element = Object.assign(document.createElement(tag), others);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria ?? {})) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

const notice = document.getElementById("notice");

export function complain(error) {
  if (error?.name === "AbortError") return;
  notice.textContent = error.message;
  notice.hidden = false;
}

export function clearNotice() {
  notice.hidden = true;
}

// Runs one task at a time: a new task, or `stop`, cancels the previous one.
export class Turn {
  #controller = null;

  get busy() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
    this.#controller = null;
  }

  async run(work) {
    this.stop();
    clearNotice();
    const controller = this.#controller = new AbortController();
    try {
      await work(controller.signal);
    } catch (error) {
      if (!controller.signal.aborted) complain(error);
    } finally {
      if (this.#controller === controller) this.#controller = null;
    }
  }
}

export function plural(count, one, many = `${one}s`) {
  return `${count.toLocaleString()} ${count === 1 ? one : many}`;
}

export function signed(number, digits = 2) {
  return `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(digits)}`;
}

export function percent(share) {
  return share && share < 0.001 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) [count, at] = [count / 1024, at + 1];
  return `${at ? count.toFixed(1) : count} ${units[at]}`;
}

export async function copy(text, button) {
  await navigator.clipboard.writeText(text);
  const said = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1500);
}

// A token in visible form: spaces and newlines are marked.
export function visible(token) {
  return token.replaceAll(" ", "·").replaceAll("\n", "↵") || "∅";
}
