// Draws a scene as SVG. Texts come from models: they go in as text and attributes, never as markup.

const byId = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";
const SIGNS = { added: "+", removed: "−", rewritten: "~" };

function shape(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function text(content, x, y, kind, width, size = 13, anchor = null) {
  const element = shape("text", { x, y, class: kind, "text-anchor": anchor });
  element.textContent = fitted(content, width, size);
  return element;
}

function tooltip(content) {
  const element = shape("title", {});
  element.textContent = content;
  return element;
}

function drawScene(scene, holder) {
  const lines = scene.lines.map((line) => {
    const path = shape("path", { d: curve(line.points), class: line.gone ? "line gone" : "line", "marker-end": line.bare ? null : "url(#arrow)" });
    path.ends = [line.from === IN ? line.frame.id : line.from, line.to === OUT ? line.frame.id : line.to];
    return path;
  });
  const frames = scene.boxes.filter((box) => box.type === "frame").map(drawFrame);
  const others = scene.boxes.filter((box) => box.type !== "frame").map((box) => (box.type === "block" ? drawBlock(box) : drawNode(box)));
  const titles = scene.boxes.filter((box) => box.type === "frame").map(drawTitle); // above the lines that cross them
  holder.replaceChildren(...frames, ...lines, ...others, ...titles);
}

function group(box, description, expanded, ...children) {
  const kinds = ["box", box.type, box.change || ""].join(" ").trim();
  const element = shape(
    "g",
    { class: kinds, transform: `translate(${box.x},${box.y})`, tabindex: 0, role: "button", "aria-label": description, "aria-expanded": expanded },
    tooltip(description),
    ...children,
  );
  element.dataset.id = box.id;
  return element;
}

function described(box) {
  return [box.label, box.sub, box.shape, box.value, box.change].filter(Boolean).join(" · ");
}

function drawNode(box) {
  const isOp = box.type === "op";
  const surface = shape("rect", { class: "shape", width: box.w, height: box.h, rx: isOp ? 5 : box.h / 2 });
  const parts = [surface];
  if (box.fill && box.change !== "removed") surface.style.fill = box.fill;
  const ink = (element) => {
    if (box.ink && box.change !== "removed") element.style.fill = box.ink;
    return element;
  };
  const sub = [box.sub, box.value || box.shape].filter(Boolean).join(" · ");
  const two = isOp && sub !== "";
  parts.push(ink(text(box.label, box.w / 2, two ? 15 : box.h / 2 + 4.5, "label", box.w - 14, 15, "middle")));
  if (two) parts.push(ink(text(sub, box.w / 2, 29, "sub", box.w - 12, 11.5, "middle")));
  if (box.change) {
    parts.push(shape("circle", { class: `flag ${box.change}`, cx: box.w - 2, cy: 2, r: 7.5 }));
    parts.push(text(SIGNS[box.change], box.w - 2, 6, "flag-sign", 20, 11, "middle"));
  }
  return group(box, described(box), null, ...parts, ...drawAsides(box));
}

function changeMarks(box, y, right) {
  const marks = [];
  let x = right;
  for (const kind of ["rewritten", "removed", "added"]) {
    if (!box.changes || !box.changes[kind]) continue;
    const words = `${SIGNS[kind]}${box.changes[kind]}`;
    marks.push(text(words, x, y, `mark ${kind}`, 60, 11, "end"));
    x -= 8 + 7 * words.length;
  }
  return { marks, left: x };
}

function drawBlock(box) {
  const parts = [shape("rect", { class: "shape", width: box.w, height: box.h, rx: 9 })];
  parts.push(text(box.value, box.w - STRIP.x, 19, "value", 90, 12, "end"));
  const { marks, left } = changeMarks(box, 19, box.w - STRIP.x - widthOf(box.value, 12) - 8);
  const room = left - STRIP.x - 4;
  parts.push(text(box.label, STRIP.x, 19, "label", room, 15), ...marks);
  const taken = widthOf(box.label, 15) + 8;
  if (widthOf(box.sub, 12) < room - taken) parts.push(text(box.sub, STRIP.x + taken, 19, "sub", room - taken, 12));
  for (const cell of box.cells) {
    const rect = shape("rect", { class: cell.fill ? "cell" : "cell none", x: cell.x, y: STRIP.y, width: cell.w, height: STRIP.h, rx: 1.5 }, tooltip([cell.label, cell.value].filter(Boolean).join(" · ")));
    if (cell.fill) rect.style.fill = cell.fill;
    rect.dataset.node = cell.node;
    parts.push(rect);
  }
  return group(box, described(box), "false", ...parts, ...drawAsides(box));
}

// What many boxes read is named beside each of them.
function drawAsides(box) {
  if (!box.asides.length) return [];
  const words = text(asideText(box), -22, box.h / 2 + 4, "aside", ASIDE_WIDTH, 11, "end");
  words.append(tooltip(box.asides.join(", ")));
  return [words, shape("path", { class: "line", d: `M-18,${box.h / 2}L0,${box.h / 2}`, "marker-end": "url(#arrow)" })];
}

function drawFrame(box) {
  const surface = shape("rect", { class: "shape", width: box.w, height: box.h, rx: 10 });
  return group(box, described(box), "true", surface, ...drawAsides(box));
}

function drawTitle(box) {
  const { marks, left } = changeMarks(box, 15, box.w - 10);
  const words = box.value ? `${box.label} · ${box.value}` : box.label;
  return shape(
    "g", { class: "title", transform: `translate(${box.x},${box.y})`, "aria-hidden": "true" },
    text(words, 10, 15, "label", left - 14, 12.5), ...marks,
  );
}
