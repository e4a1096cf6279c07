// Numbers as colours, on elements and on canvases.

const LABELS = 40; // tokens that have room for their names

// A background colour for a number from -1 to 1.
export function shade(element, value) {
  const color = value < 0 ? "var(--against)" : "var(--accent)";
  element.style.backgroundColor = `color-mix(in srgb, ${color} ${Math.round(55 * Math.min(1, Math.abs(value)))}%, transparent)`;
}

function colors() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const read = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const found = { ink: read("--ink"), soft: read("--soft"), accent: read("--accent"), line: read("--line") };
  probe.remove();
  return found;
}

// Draws weights [row][column] as a map, with names beside it if given. The row `chosen` gets a frame.
export function heat(canvas, weights, scale, rows, columns, chosen) {
  const [height, width] = [weights.length, weights[0].length];
  const context = canvas.getContext("2d");
  const named = rows && Math.max(height, width) <= LABELS;
  const { ink, soft, accent, line } = colors();
  const cell = rows ? Math.max(scale * 2, Math.floor(scale * 420 / (Math.max(height, width) + (named ? 6 : 0)))) : Math.max(1, Math.floor(64 / Math.max(height, width)));
  const size = Math.min(cell * 0.72, 14 * scale);
  context.font = `${size}px ui-monospace, "DejaVu Sans Mono", monospace`;
  const longest = named ? Math.min(110 * scale, Math.max(...[...rows, ...columns].map((text) => context.measureText(text).width)) + 10 * scale) : 0;
  const edge = rows ? scale : 0;
  canvas.width = longest + width * cell + edge;
  canvas.height = longest + height * cell + edge;
  const paint = canvas.getContext("2d");
  paint.font = context.font;
  for (let i = 0; i < height; i++) {
    for (let j = 0; j < width; j++) {
      paint.globalAlpha = Math.sqrt(weights[i][j]); // small weights stay visible
      paint.fillStyle = accent;
      paint.fillRect(longest + j * cell, longest + i * cell, cell, cell);
    }
  }
  paint.globalAlpha = 1;
  if (!rows) return;
  paint.lineWidth = scale;
  paint.strokeStyle = line;
  paint.strokeRect(longest, longest, width * cell, height * cell);
  if (chosen !== undefined) {
    paint.strokeStyle = ink;
    paint.strokeRect(longest, longest + chosen * cell, width * cell, cell);
  }
  if (!named) return;
  paint.font = `${size}px ui-monospace, "DejaVu Sans Mono", monospace`;
  paint.textBaseline = "middle";
  for (const [i, text] of rows.entries()) {
    paint.fillStyle = i === chosen ? ink : soft;
    paint.textAlign = "right";
    paint.fillText(text, longest - 5 * scale, longest + (i + 0.5) * cell, longest - 6 * scale);
  }
  paint.fillStyle = soft;
  paint.textAlign = "left";
  for (const [j, text] of columns.entries()) {
    paint.save();
    paint.translate(longest + (j + 0.5) * cell, longest - 5 * scale);
    paint.rotate(-Math.PI / 2);
    paint.fillText(text, 0, 0, longest - 6 * scale);
    paint.restore();
  }
}
