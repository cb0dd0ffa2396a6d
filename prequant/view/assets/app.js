// The state of the page and what changes it: stages, colourings, what is open, what is chosen, keys.

const model = new Model(JSON.parse(byId("record").textContent));

const state = { stage: model.stages.length - 1, colouring: "bits", open: new Set(), chosen: null, cell: null };
let scene = null;
const current = () => model.stages[state.stage];
const panel = new Panel(byId("panel"), (id) => reveal(id));
const itemOf = (id) => current().nodes.get(id) || current().blocks.get(id) || null;

// ---- drawing -----------------------------------------------------------------------------------------------------------

function redraw() {
  scene = makeScene(current(), state.open, state.colouring);
  drawScene(scene, byId("scene"));
  mark();
}

function recoloured() {
  recolour(scene, current(), state.colouring);
  drawScene(scene, byId("scene"));
  mark();
}

function boxOf(id) {
  return scene.boxes.find((box) => box.id === id) || null;
}

// Redraw, and keep a box where it is on the screen.
function redrawAround(id) {
  const before = boxOf(id);
  redraw();
  const after = boxOf(id);
  if (before && after) {
    view.x += (before.x + before.w / 2 - after.x - after.w / 2) * view.scale;
    view.y += (before.y - after.y) * view.scale;
  }
  applyView();
}

function mark() {
  for (const element of byId("scene").querySelectorAll(".selected, .near")) element.classList.remove("selected", "near");
  for (const element of byId("scene").children) {
    if (element.dataset.id === state.chosen) element.classList.add("selected");
    if (element.ends && element.ends.includes(state.chosen)) element.classList.add("near");
  }
  if (state.cell) for (const cell of byId("scene").querySelectorAll(".cell")) cell.classList.toggle("selected", cell.dataset.node === state.cell);
}

// ---- choosing and opening ----------------------------------------------------------------------------------------------

function choose(id, cell = null) {
  state.chosen = id;
  state.cell = cell;
  mark();
  describe();
}

function describe() {
  const item = itemOf(state.cell || state.chosen);
  if (!item) panel.showModel(model, current());
  else if (item.children) panel.showBlock(current(), item);
  else panel.showNode(current(), item);
}

function toggle(id) {
  if (state.open.has(id)) state.open.delete(id);
  else state.open.add(id);
  state.chosen = id;
  state.cell = null;
  redrawAround(id);
  describe();
  focusBox(id);
}

function focusBox(id) {
  for (const element of byId("scene").children) if (element.dataset.id === id) element.focus({ preventScroll: true });
}

// Open what a node or block is in, choose it and bring it to the middle.
function reveal(id) {
  const item = itemOf(id);
  if (!item) return;
  for (const block of current().ancestors(item)) state.open.add(block.id);
  redraw();
  choose(id);
  const box = boxOf(id);
  const { width, height } = byId("drawing").getBoundingClientRect();
  view.scale = Math.max(view.scale, 0.75);
  view.x = width / 2 - (box.x + box.w / 2) * view.scale;
  view.y = height / 2 - (box.y + Math.min(box.h, height / 2) / 2) * view.scale;
  applyView();
}

byId("scene").addEventListener("click", (event) => {
  if (view.moved) return;
  const cell = event.target.closest(".cell");
  const box = event.target.closest(".box");
  if (!box) return;
  if (cell) choose(box.dataset.id, cell.dataset.node);
  else activate(box.dataset.id);
});

function activate(id) {
  const item = itemOf(id);
  if (item && item.children) toggle(id);
  else choose(id);
}

byId("scene").addEventListener("keydown", (event) => {
  const box = event.target.closest(".box");
  if (box && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    activate(box.dataset.id);
  }
});

// ---- head: title, totals, stages, colourings ---------------------------------------------------------------------------

function showTotals() {
  const { stage } = current();
  const original = model.record.original_bytes;
  const results = Object.values(stage.results).map(number);
  const total = (name, value, remark) => make("div", {}, make("dt", {}, name), make("dd", {}, value, remark ? make("small", {}, ` ${remark}`) : null));
  const saved = stage.bytes < original ? `${(original / stage.bytes).toFixed(2)}× smaller` : "";
  byId("totals").replaceChildren(
    total("Size", `${formatBytes(original)} → ${formatBytes(stage.bytes)}`, saved),
    total("Weights", stage.mean_bits === null ? "none" : `${stage.mean_bits.toFixed(2)} bits each`, plural(stage.weights.length, "weight")),
    ...(results.length ? [total("Output error", formatDecibels(Math.min(...results)), model.record.batch)] : []),
  );
}

function showStages() {
  const buttons = model.stages.map(({ stage, index }) => {
    const parts = [["+", stage.added.length], ["−", stage.removed.length], ["~", Object.keys(stage.rewritten).length]];
    const changes = parts.filter(([, n]) => n).map(([sign, n]) => `${sign}${n}`).join("  ");
    const button = make(
      "button",
      { type: "button", role: "tab", title: stage.source || stage.title, onclick: () => step(index) },
      stage.title, make("small", {}, index ? changes || "no change" : plural(stage.weights.length, "weight")),
    );
    return button;
  });
  byId("stages").replaceChildren(...buttons);
  byId("stages").hidden = model.stages.length < 2;
}

function markStage() {
  [...byId("stages").children].forEach((button, i) => {
    button.setAttribute("aria-selected", i === state.stage);
    button.tabIndex = i === state.stage ? 0 : -1;
  });
  byId("changes").hidden = !current().hasBefore;
}

// The same blocks stay open from one stage to the next, and the drawing where it is.
function step(index) {
  if (index < 0 || index >= model.stages.length) return;
  const chosen = state.chosen;
  state.stage = index;
  current().showRemoved(byId("removed").checked);
  if (!itemOf(state.chosen)) state.chosen = null;
  if (!itemOf(state.cell)) state.cell = null;
  markStage();
  showTotals();
  showColourings();
  if (chosen) redrawAround(chosen);
  else redraw();
  describe();
}

function showColourings() {
  const usable = (name) => [...current().nodes.values()].some((node) => COLOURINGS[name].of(current(), node) !== null);
  for (const input of byId("colourings").querySelectorAll("input")) {
    input.disabled = !usable(input.value);
    input.checked = input.value === state.colouring;
  }
  showLegend();
}

function makeColourings() {
  for (const [name, colouring] of Object.entries(COLOURINGS)) {
    const input = make("input", { type: "radio", name: "colouring", value: name });
    input.addEventListener("change", () => {
      state.colouring = name;
      showLegend();
      recoloured();
    });
    byId("colourings").append(make("label", { title: colouring.help }, input, colouring.title));
  }
}

function showLegend() {
  const colouring = COLOURINGS[state.colouring];
  const steps = colouring.legend(current().rangeOf(colouring)).map(([colour, words]) => {
    const key = make("span", {}, words);
    key.style.background = colour;
    key.style.color = inkOn(colour);
    return key;
  });
  const words = steps.length ? colouring.help : `${colouring.title}: nothing known at this stage`;
  byId("legend").replaceChildren(...steps, make("em", {}, words));
  byId("legend").setAttribute("aria-label", `Legend. ${words}`);
}

byId("removed").addEventListener("change", () => {
  current().showRemoved(byId("removed").checked);
  if (!itemOf(state.chosen)) choose(null);
  redraw();
});

// ---- keys -------------------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = {
    "/": () => {
      byId("search").focus();
      byId("search").select();
    },
    ArrowLeft: () => step(state.stage - 1),
    ArrowRight: () => step(state.stage + 1),
    Escape: () => choose(null),
    "+": () => zoom(1.25),
    "-": () => zoom(0.8),
    0: fit,
  };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
  if (event.target.closest("#stages") && event.key.startsWith("Arrow")) byId("stages").children[state.stage].focus();
});

function reset() {
  state.open = current().initiallyOpen();
  state.chosen = state.cell = null;
  redraw();
  describe();
  fit(true);
}

byId("reset").addEventListener("click", reset);

for (const kind of ["pointerdown", "keydown", "wheel"]) window.addEventListener(kind, () => byId("hint").classList.add("read"), { once: true, passive: true });

// ---- beginning ---------------------------------------------------------------------------------------------------------

byId("title").textContent = model.record.title || "prequant";
makeColourings();
showStages();
markStage();
showTotals();
showColourings();
reset();
