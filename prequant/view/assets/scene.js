// From a stage and the blocks that are open to boxes and lines with places: what the page and the pictures draw.
// Only what is open is laid out, by dagre; the work grows with the boxes that are seen, not with the model.

const SIZES = {
  op: { w: 150, h: 34 },
  block: { w: 292, h: 48 },
  bare: { w: 292, h: 32 }, // a block without weights
  terminal: { w: 164, h: 26 },
};
const STRIP = { x: 12, y: 28, h: 12, gap: 1.5 };
const FRAME = { title: 22, side: 14, bottom: 12 };
const SPACING = { nodesep: 16, ranksep: 20, marginx: 0, marginy: 0 };
const [IN, OUT] = ["in:", "out:"]; // where lines enter and leave a frame
const BROADCAST = 5; // what so many boxes of a frame read (a mask, say) is named beside each, instead of a fan of lines
const ASIDE_WIDTH = 108;

// `open`: ids of open blocks. Returns { width, height, boxes, lines }; frames come before what is in them.
function makeScene(stage, open, colouringName) {
  const colouring = COLOURINGS[colouringName];
  const range = stage.rangeOf(colouring);
  const boxes = [];
  const paths = new Map(); // id of a node -> the open frames around it from the outermost, and the box it is seen in

  const visit = (item, above) => {
    if (item.children && open.has(item.id)) {
      const frame = frameBox(stage, item, colouring, range);
      frame.inside = [];
      frame.asides = [];
      frame.flows = new Map();
      if (above.length) boxes.push(frame);
      for (const child of item.children) frame.inside.push(visit(child, [...above, frame]));
      return frame;
    }
    const box = item.children ? blockBox(stage, item, colouring, range) : nodeBox(stage, item, colouring, range);
    box.asides = [];
    boxes.push(box);
    for (const node of item.children ? item.nodes : [item]) paths.set(node.id, [...above, box]);
    return box;
  };
  const root = visit(stage.root, []);
  for (const node of stage.nodes.values()) {
    for (const input of node.inputs) connect(paths.get(input.id), paths.get(node.id), input.removed || node.removed);
  }
  const lines = [];
  const { width, height } = arrange(root, lines);
  settle(root, SPACING.nodesep, SPACING.nodesep);
  for (const line of lines) line.points = line.points.map(([x, y]) => [x + line.frame.x + line.frame.left, y + line.frame.y + line.frame.top]);
  return { width: width + 2 * SPACING.nodesep, height: height + 2 * SPACING.nodesep, boxes, lines };
}

// Note what flows from one node to another in every frame on the way: out of frames, across, and into frames.
function connect(from, to, gone) {
  let common = 0;
  while (from[common] === to[common] && common < from.length && common < to.length) common++;
  if (common === from.length || common === to.length) return; // within one closed block
  const source = from[common];
  note(from[common - 1], source.id, to[common].id, source, gone);
  for (let i = common + 1; i < from.length; i++) note(from[i - 1], from[i].id, OUT, from[i], gone);
  for (let i = common + 1; i < to.length; i++) note(to[i - 1], IN, to[i].id, source, gone);
}

function note(frame, from, to, source, gone) {
  const key = JSON.stringify([from === IN ? source.id : from, to, from === IN]);
  const flow = frame.flows.get(key);
  if (flow) flow.gone = flow.gone && gone;
  else frame.flows.set(key, { from, to, source, gone });
}

// Lay out a frame after the frames in it: its size, the places in it, and its lines, all relative to its content.
function arrange(frame, lines) {
  for (const box of frame.inside) if (box.inside) arrange(box, lines);
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", ...SPACING });
  graph.setDefaultEdgeLabel(() => ({}));
  const flows = drawnFlows(frame);
  for (const box of frame.inside) graph.setNode(box.id, { width: box.w + 2 * asideRoom(box), height: box.h });
  const ends = { [IN]: flows.some((flow) => flow.from === IN), [OUT]: flows.some((flow) => flow.to === OUT) };
  for (const end of [IN, OUT]) if (ends[end]) graph.setNode(end, { width: 1, height: 1 });
  for (const { from, to } of flows) graph.setEdge(from, to, {});
  // Lines enter above everything, and leave below it.
  for (const { id } of frame.inside) {
    if (ends[IN] && !graph.inEdges(id).length) graph.setEdge(IN, id, { weight: 0 });
    if (ends[OUT] && !graph.outEdges(id).length) graph.setEdge(id, OUT, { weight: 0 });
  }
  dagre.layout(graph);
  const { width, height } = widened(graph);
  for (const box of frame.inside) Object.assign(box, { atX: graph.node(box.id).x, atY: graph.node(box.id).y });
  for (const end of [IN, OUT]) if (ends[end]) frame[end] = graph.node(end).x;
  frame.left = frame.type === "root" ? 0 : FRAME.side;
  frame.top = frame.type === "root" ? 0 : FRAME.title;
  const title = frame.type === "root" ? 0 : 8 * `${frame.label} ${frame.value}`.length + 90;
  frame.w = Math.max(width, title) + 2 * frame.left;
  frame.h = height + (frame.type === "root" ? 0 : FRAME.title + FRAME.bottom);
  const merged = new Map(); // the lines of what comes in from several sources are one
  for (const { from, to, gone } of flows) {
    const key = JSON.stringify([from, to]);
    if (merged.has(key)) merged.get(key).gone = merged.get(key).gone && gone;
    else merged.set(key, lineOf(frame, graph, from, to, gone));
  }
  lines.push(...merged.values());
  return { width: frame.w, height: frame.h };
}

// dagre counts boxes only: make room for lines that go around them on the outside.
function widened(graph) {
  const { width, height } = graph.graph();
  const across = graph.edges().flatMap((edge) => graph.edge(edge).points.map(({ x }) => x));
  const left = across.reduce((low, x) => Math.min(low, x), 0);
  const right = across.reduce((high, x) => Math.max(high, x), width);
  for (const id of graph.nodes()) graph.node(id).x -= left;
  for (const edge of graph.edges()) for (const point of graph.edge(edge).points) point.x -= left;
  return { width: right - left, height };
}

// The flows of a frame that are drawn as lines; those from a source that many boxes read are named beside these.
function drawnFlows(frame) {
  const readers = new Map();
  for (const flow of frame.flows.values()) {
    if (flow.to !== OUT) readers.set(flow.source.id, (readers.get(flow.source.id) || 0) + 1);
  }
  const byId = new Map(frame.inside.map((box) => [box.id, box]));
  return [...frame.flows.values()].filter(({ to, source }) => {
    if (to === OUT || readers.get(source.id) < BROADCAST) return true;
    byId.get(to).asides.push(source.label);
    return false;
  });
}

const asideRoom = (box) => (box.asides.length ? ASIDE_WIDTH : 0);

// A line within a frame. Where it meets a frame it goes to the point at which lines enter or leave that one.
function lineOf(frame, graph, from, to, gone) {
  const points = graph.edge(from, to).points.map(({ x, y }) => [x, y]);
  const [first, last] = [points[0], points[points.length - 1]];
  const byId = (id) => frame.inside.find((box) => box.id === id);
  const [start, end] = [from === IN ? null : byId(from), to === OUT ? null : byId(to)];
  if (start) points[0] = start.inside && OUT in start ? [start.atX - start.w / 2 + start.left + start[OUT], start.atY + start.h / 2] : [clamped(first[0], start), start.atY + start.h / 2];
  else points[0] = [first[0], -frame.top];
  if (end) points[points.length - 1] = end.inside && IN in end ? [end.atX - end.w / 2 + end.left + end[IN], end.atY - end.h / 2] : [clamped(last[0], end), end.atY - end.h / 2];
  else points[points.length - 1] = [last[0], frame.h - frame.top];
  const bare = to === OUT || Boolean(end.inside); // goes on within a frame, or outside: no arrow yet
  return { from, to, gone, points, frame, bare };
}

const clamped = (x, box) => Math.min(box.atX + box.w / 2 - 10, Math.max(box.atX - box.w / 2 + 10, x));

// From places within frames to places in the drawing.
function settle(frame, x, y) {
  frame.x = x;
  frame.y = y;
  for (const box of frame.inside) {
    const [left, top] = [x + frame.left + box.atX - box.w / 2, y + frame.top + box.atY - box.h / 2];
    if (box.inside) settle(box, left, top);
    else Object.assign(box, { x: left, y: top });
  }
}

// ---- boxes ----------------------------------------------------------------------------------------------------------

function painted(stage, item, colouring, range, value = stage.valueOf(item, colouring)) {
  if (value === null) return { value: "", fill: null, ink: null };
  const fill = colouring.colour(value, range);
  return { value: colouring.text(value), fill, ink: inkOn(fill) };
}

function paintedWeight(stage, node, colouring, range) {
  return painted(stage, node, colouring, range, (colouring.ofWeight || colouring.of)(stage, node));
}

function nodeBox(stage, node, colouring, range) {
  const { record } = node;
  const isOp = record.kind === "op";
  const size = isOp ? SIZES.op : SIZES.terminal;
  const op = record.target.replace(/^operator\./, "").split(".")[0];
  const label = isOp ? node.label || op : record.kind === "input" ? record.target : "output";
  const sub = isOp && node.label && node.label !== op ? op : "";
  return {
    id: node.id, type: record.kind, label, sub, shape: record.shape, change: stage.hasBefore ? stage.changeOf(node) : null,
    cells: [], ...size, ...painted(stage, node, colouring, range),
  };
}

function blockBox(stage, block, colouring, range) {
  return {
    id: block.id, type: "block", label: block.label, sub: block.kind, change: null, changes: stage.hasBefore ? block.changes : null,
    cells: strip(stage, block, colouring, range), ...(block.users.length ? SIZES.block : SIZES.bare), ...painted(stage, block, colouring, range),
  };
}

function frameBox(stage, block, colouring, range) {
  return {
    id: block.id, type: block.parent ? "frame" : "root", label: block.label, sub: block.kind, change: null, w: 0, h: 0, cells: [],
    changes: stage.hasBefore ? block.changes : null, ...painted(stage, block, colouring, range),
  };
}

// A closed block shows each weight that it computes with as a cell, as wide as the weight is large.
function strip(stage, block, colouring, range) {
  const users = block.users;
  if (!users.length) return [];
  const room = SIZES.block.w - 2 * STRIP.x - STRIP.gap * (users.length - 1);
  const shares = users.map((node) => Math.sqrt(stage.elementsOf(node)));
  const least = Math.min(8, room / users.length);
  const rest = Math.max(0, room - least * users.length);
  let x = STRIP.x;
  return users.map((node, i) => {
    const w = Math.max(0.5, least + (rest * shares[i]) / Math.max(1e-9, sum(shares)));
    const cell = { node: node.id, x, w, label: node.record.uses.join(", "), ...paintedWeight(stage, node, colouring, range) };
    x += w + STRIP.gap;
    return cell;
  });
}

// What a box reads that is named beside it, as far as there is room.
function asideText({ asides }) {
  const more = asides.length > 1 ? ` +${asides.length - 1}` : "";
  return asides.length ? fitted(asides[0], ASIDE_WIDTH - 24 - widthOf(more, 11), 11) + more : "";
}

// A line as the path of an SVG: smooth through its points.
function curve(points) {
  const at = ([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`;
  if (points.length < 3) return `M${points.map(at).join("L")}`;
  let path = `M${at(points[0])}`;
  for (let i = 1; i < points.length - 1; i++) {
    const middle = i < points.length - 2 ? [(points[i][0] + points[i + 1][0]) / 2, (points[i][1] + points[i + 1][1]) / 2] : points[i + 1];
    path += `Q${at(points[i])} ${at(middle)}`;
  }
  return path;
}

// Sans-serif letters are taken to be 0.6 em wide: text is measured without a browser.
const LETTER = 0.6;
const widthOf = (text, size) => text.length * size * LETTER;

// A text cut to a width in pixels, in the middle, where names differ least.
function fitted(text, width, size) {
  const letters = Math.floor(width / (size * LETTER));
  if (text.length <= letters) return text;
  const kept = Math.max(1, letters - 1);
  return `${text.slice(0, Math.ceil(kept * 0.4))}…${text.slice(text.length - Math.floor(kept * 0.6))}`;
}

// The same places in other colours.
function recolour(scene, stage, colouringName) {
  const colouring = COLOURINGS[colouringName];
  const range = stage.rangeOf(colouring);
  for (const box of scene.boxes) {
    Object.assign(box, painted(stage, stage.nodes.get(box.id) || stage.blocks.get(box.id), colouring, range));
    for (const cell of box.cells) Object.assign(cell, paintedWeight(stage, stage.nodes.get(cell.node), colouring, range));
  }
}
