// The difference of two texts, word by word, by the longest common subsequence (Wagner and Fischer 1974).

const MOST = 4e6; // cells of the table

function words(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
}

// The parts in order: {text} where the texts agree, {cut, add} where they differ.
export function diff(before, after) {
  const a = words(before);
  const b = words(after);
  if (a.length * b.length > MOST) return [{ cut: before, add: after }];
  const width = b.length + 1;
  const common = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const parts = [];
  const change = () => {
    if (parts.at(-1)?.text !== undefined || !parts.length) parts.push({ cut: "", add: "" });
    return parts.at(-1);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      if (parts.at(-1)?.text === undefined) parts.push({ text: "" });
      parts.at(-1).text += a[i++];
      j++;
    } else if (j === b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      change().cut += a[i++];
    } else {
      change().add += b[j++];
    }
  }
  return joined(parts);
}

// Changes with only a space between them are merged: people read phrases.
function joined(parts) {
  const out = [];
  for (const part of parts) {
    const [last, before] = [out.at(-1), out.at(-2)];
    if (part.text === undefined && last?.text !== undefined && /^\s+$/.test(last.text) && before?.text === undefined && before) {
      out.pop();
      before.cut += last.text + part.cut;
      before.add += last.text + part.add;
    } else out.push(part);
  }
  return out;
}
