// What a picture draws: the scene of one stage, with its legend, as JSON. Called from Python.

function sceneOf(recordText, optionsText) {
  const options = JSON.parse(optionsText);
  const model = new Model(JSON.parse(recordText));
  const stage = model.stages[model.stages.length - 1];
  stage.showRemoved(false); // a picture shows what there is
  const open = options.depth === null ? stage.initiallyOpen() : openedTo(stage, options.depth);
  const scene = makeScene(stage, open, options.colouring);
  const colouring = COLOURINGS[options.colouring];
  return JSON.stringify({
    width: scene.width,
    height: scene.height,
    boxes: scene.boxes.map(drawable),
    lines: scene.lines.map(({ points, bare }) => ({ path: curve(points), bare })),
    legend: colouring.legend(stage.rangeOf(colouring)).map(([colour, words]) => [colour, inkOn(colour), words]),
    help: colouring.help,
    strip: STRIP,
  });
}

// A box without what it was laid out by, its texts cut to their places.
function drawable(box) {
  const room = box.type === "block" ? box.w - 3 * STRIP.x - widthOf(box.value, 12) : box.w - 14;
  const label = fitted(box.label, box.type === "frame" ? box.w : room, 15);
  const sub = [box.sub, box.type === "block" ? "" : box.value || box.shape].filter(Boolean).join(" · ");
  const { type, value, fill, ink, x, y, w, h, cells } = box;
  return {
    type, label, value, fill, ink, x, y, w, h, asides: asideText(box),
    sub: type === "block" ? (widthOf(label, 15) + widthOf(box.sub, 12) + 8 < room ? box.sub : "") : fitted(sub, room, 11.5),
    subX: STRIP.x + widthOf(label, 15) + 8, cells: cells.map(({ x, w, fill }) => ({ x, w, fill })),
  };
}

// Blocks down to a depth: 0 is the model as one block, 1 its first level.
function openedTo(stage, depth) {
  const open = new Set();
  const enter = (block, level) => {
    if (level > depth) return;
    open.add(block.id);
    for (const child of block.children) if (child.children) enter(child, level + 1);
  };
  enter(stage.root, 0);
  return open;
}
