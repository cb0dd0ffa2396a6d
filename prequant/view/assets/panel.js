// The side panel: what is known of the model, of a block, or of a node.

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") element.addEventListener("click", value);
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const count = (value) => value.toLocaleString("en");
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const known = (value, words) => (value === null || value === undefined ? "not known" : words(value));

function facts(pairs) {
  const rows = pairs.filter(Boolean).map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
  return make("table", {}, make("tbody", {}, ...rows));
}

function table(headings, rows, kind = "") {
  return make(
    "table", { class: `rows ${kind}` },
    make("thead", {}, make("tr", {}, ...headings.map((heading) => make("th", { scope: "col" }, heading)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell))))),
  );
}

// A dotted name that may be broken after its dots.
function dotted(name) {
  return name.split(/(?<=[._{,=])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
}

class Panel {
  constructor(element, go) {
    this.element = element;
    this.go = go;
  }

  link(item, words) {
    return make("button", { type: "button", class: "link", onclick: () => this.go(item.id) }, ...dotted(words));
  }

  show(...children) {
    this.element.replaceChildren(...children.flat().filter(Boolean));
    this.element.scrollTop = 0;
  }

  // ---- the model -----------------------------------------------------------------------------------------------------

  showModel(model, stage) {
    const { record } = model;
    this.show(
      make("h2", {}, ...dotted(stage.stage.source || stage.stage.title)),
      this.stageFacts(stage),
      ...record.notes.map((note) => make("p", { class: "note" }, note)),
      this.stageTable(model, stage),
      this.worst(stage, "Weights with the largest error", COLOURINGS.weights),
      this.worst(stage, "Values with the largest error", COLOURINGS.values),
      stage.undrawn ? make("p", { class: "quiet" }, `${plural(stage.undrawn, "op")} on sizes and checks are not drawn.`) : null,
    );
  }

  stageFacts(stage) {
    const { changed, kept, seconds } = stage.stage;
    const what = stage.hasBefore
      ? [["Changed, kept", `${count(changed)}, ${count(kept)}`], ["Ran for", formatSeconds(seconds)]]
      : [];
    const results = Object.entries(stage.stage.results).map(([name, value]) => [`Error of ${name}`, formatDecibels(number(value))]);
    return facts([["Nodes", count(stage.nodes.size)], ...what, ...results]);
  }

  stageTable(model, current) {
    if (model.stages.length < 2) return null;
    const rows = model.stages.map(({ stage, index }) => [
      index === current.index ? make("strong", {}, stage.title) : stage.title,
      formatBytes(stage.bytes),
      known(stage.mean_bits, (bits) => bits.toFixed(2)),
      Object.values(stage.results).length ? formatDecibels(Math.min(...Object.values(stage.results).map(number))) : "–",
    ]);
    return make("section", {}, make("h3", {}, "Step by step"), table(["after", "bytes", "bits", "output"], rows));
  }

  worst(stage, title, colouring) {
    const candidates = [...stage.nodes.values()].filter((node) => colouring === COLOURINGS.values || node.record.uses.length);
    const nodes = candidates
      .map((node) => [colouring.of(stage, node), node])
      .filter(([value]) => value !== null && value !== Infinity)
      .sort(([first], [second]) => first - second)
      .slice(0, 5);
    if (!nodes.length) return null;
    const rows = nodes.map(([value, node]) => [this.link(node, this.nameOf(node)), this.coloured(colouring, stage, value)]);
    return make("section", {}, make("h3", {}, title), table(["", "SQNR"], rows));
  }

  nameOf(node) {
    const [use] = node.record.uses;
    return use ? use.replace(/\.weight$/, "") : node.record.module || node.record.name;
  }

  coloured(colouring, stage, value) {
    if (value === null) return "–";
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = colouring.colour(value, stage.rangeOf(colouring));
    return make("span", {}, swatch, colouring.text(value));
  }

  // ---- a block -------------------------------------------------------------------------------------------------------

  showBlock(stage, block) {
    const value = (name) => stage.valueOf(block, COLOURINGS[name]);
    const { added, removed, rewritten } = block.changes;
    this.show(
      make("h2", {}, block.path && block.label !== PREPARATION ? block.path : block.label || "the model"),
      make("p", { class: "quiet" }, block.kind),
      this.crumbs(stage, block),
      facts([
        ["Nodes", count(block.nodes.length)],
        ["Bytes", formatBytes(value("bytes") || 0)],
        block.users.length ? ["Bits per weight", known(value("bits"), formatBits)] : null,
        block.users.length ? ["Worst weight error", known(value("weights"), formatDecibels)] : null,
        stage.errors.size ? ["Worst value error", known(value("values"), formatDecibels)] : null,
        stage.times.size ? ["Time of its ops", known(value("time"), formatSeconds)] : null,
        stage.hasBefore ? ["This pass", `${added} added, ${removed} removed, ${rewritten} rewritten`] : null,
      ]),
      this.weightTable(stage, block),
    );
  }

  weightTable(stage, block) {
    if (!block.users.length) return null;
    const start = block.path ? block.path.length + 1 : 0;
    const rows = block.users.slice(0, 200).map((node) => {
      const name = this.nameOf(node);
      return [
        this.link(node, name.startsWith(block.path) ? name.slice(start) || name : name),
        this.coloured(COLOURINGS.bits, stage, stage.bitsOf(node)),
        this.coloured(COLOURINGS.weights, stage, stage.weightErrorOf(node)),
      ];
    });
    const more = block.users.length > 200 ? make("p", { class: "quiet" }, `and ${count(block.users.length - 200)} more`) : null;
    return make("section", {}, make("h3", {}, "Weights"), table(["", "bits", "error"], rows), more);
  }

  crumbs(stage, item) {
    const above = stage.ancestors(item).filter((block) => block.parent);
    if (!above.length) return null;
    const parts = above.flatMap((block, i) => [i ? " › " : "", this.link(block, block.label)]);
    return make("p", { class: "crumbs" }, "in ", ...parts);
  }

  // ---- a node --------------------------------------------------------------------------------------------------------

  showNode(stage, node) {
    const { record } = node;
    this.show(
      make("h2", {}, ...dotted(record.name)),
      make("p", { class: "quiet" }, record.kind === "op" ? record.target : record.kind),
      this.crumbs(stage, node),
      this.change(stage, node),
      make("h3", {}, "Value"),
      facts([
        ["Shape", record.shape || "–"],
        ["Type", record.dtype || "–"],
        node.removed ? null : ["Error", this.valueError(stage, node)],
        stage.timeOf(node) === null ? null : ["Time", formatSeconds(stage.timeOf(node))],
      ]),
      ...stage.weightsOf(node).map((weight) => this.weight(weight)),
      this.tensors(record),
      make("h3", {}, "Expression"),
      make("code", {}, record.text),
      this.neighbours("Reads", node.inputs),
      this.neighbours("Read by", node.readers),
    );
  }

  valueError(stage, node) {
    const error = stage.valueErrorOf(node);
    if (error !== null) return this.coloured(COLOURINGS.values, stage, error);
    return stage.errors.size ? "nothing to compare with" : stage.times.size && !stage.hasBefore ? "this is the original" : "not measured";
  }

  change(stage, node) {
    const kind = stage.hasBefore ? stage.changeOf(node) : null;
    if (!kind) return null;
    const { record } = stage;
    const before = kind === "rewritten" ? record.nodes[stage.rewritten.get(node.record.name)] : null;
    const words = { added: "Added by this pass", removed: "Removed by this pass", rewritten: "Rewritten by this pass; it was" }[kind];
    return make("div", { class: `change ${kind}` }, make("p", {}, words), before ? make("code", {}, before.text) : null);
  }

  tensors({ tensors }) {
    if (!tensors.length) return null;
    const rows = tensors.map(([name, shape, dtype, bytes]) => [make("div", {}, ...dotted(name)), `${shape} ${dtype}`, formatBytes(bytes)]);
    return make("section", {}, make("h3", {}, "Tensors"), table(["", "", ""], rows, "tensors"));
  }

  neighbours(title, nodes) {
    if (!nodes.length) return null;
    const rows = nodes.slice(0, 30).flatMap((node, i) => [i ? ", " : "", this.link(node, node.record.name)]);
    const more = nodes.length > 30 ? ` and ${count(nodes.length - 30)} more` : "";
    return make("section", {}, make("h3", {}, title), make("p", {}, ...rows, more));
  }

  // ---- a weight ------------------------------------------------------------------------------------------------------

  weight(weight) {
    const error = weight.sqnr === null ? "not known: no original" : `${formatDecibels(number(weight.sqnr))}${weight.recorded ? ", as recorded when it was saved" : ""}`;
    const elements = weight.shape[0] * weight.shape[1];
    return make(
      "section", {},
      make("h3", {}, "Weight"),
      make("p", {}, ...dotted(weight.name)),
      facts([
        ["Format", weight.format + (weight.lowered ? ", packed" : weight.format.includes(":") ? ", simulated" : "")],
        weight.input_format ? ["Inputs quantized", weight.input_format] : null,
        ["Shape", weight.shape.join(" × ")],
        ["Bytes", `${formatBytes(weight.bytes)} of ${formatBytes(weight.float_bytes)}`],
        ["Bits per weight", weight.bits.toFixed(2)],
        ["Error", error],
        weight.outliers ? ["Outliers", `${count(weight.outliers)} (${significant((100 * weight.outliers) / elements, 2)} %)`] : null,
        weight.scales ? ["Scale, median", significant(weight.scales[1], 3)] : null,
        weight.scales ? ["Scales, from to", `${significant(weight.scales[0], 3)} – ${significant(weight.scales[2], 3)}`] : null,
      ]),
      weight.histogram ? valueChart(weight) : null,
      weight.codes.length > 1 ? codeChart(weight) : null,
    );
  }
}
