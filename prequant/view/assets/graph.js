// The record of a model as a tree of blocks (modules) with nodes in them, one stage of the pipeline at a time.
// No DOM here: the pictures are made with this, too.

const number = (value) => (value === "inf" ? Infinity : value === "-inf" ? -Infinity : value);
const lastPart = (path) => path.slice(path.lastIndexOf(".") + 1);

const PREPARATION = "preparation";
const GROUPED_FROM = 3; // so many nodes that only prepare masks and positions are drawn as one block

class Model {
  constructor(record) {
    this.record = record;
    this.stages = record.stages.map((stage, index) => new StageGraph(record, index));
  }
}

// One stage: its nodes by id, the tree of its blocks, and figures by node.
class StageGraph {
  constructor(record, index) {
    this.record = record;
    this.stage = record.stages[index];
    this.index = index;
    this.added = new Set(this.stage.added);
    this.rewritten = new Map(Object.entries(this.stage.rewritten));
    this.errors = new Map(Object.entries(this.stage.errors).map(([name, value]) => [name, number(value)]));
    this.times = new Map(Object.entries(this.stage.times));
    this.weights = new Map(this.stage.weights.map((at) => [record.weights[at].name, record.weights[at]]));
    this.hasBefore = index > 0;
  }

  // Built when first asked for: a page opens with one stage.
  get root() {
    if (!this._root) this._build(true);
    return this._root;
  }

  get nodes() {
    if (!this._nodes) this._build(true);
    return this._nodes;
  }

  get blocks() {
    if (!this._blocks) this._build(true);
    return this._blocks;
  }

  showRemoved(shown) {
    if (!this._root || this._withRemoved !== shown) this._build(shown);
  }

  _build(withRemoved) {
    this._withRemoved = withRemoved;
    const records = this.record.nodes;
    const live = this.stage.nodes.map((at) => ({ id: `n:${records[at].name}`, record: records[at], removed: false }));
    const gone = withRemoved
      ? this.stage.removed.map((at) => ({ id: `r:${records[at].name}`, record: records[at], removed: true }))
      : [];
    this._nodes = new Map();
    for (const node of [...live, ...gone]) if (node.record.data) this._nodes.set(node.id, node);
    this.undrawn = live.filter((node) => !node.record.data).length;
    this._connect();
    this._root = this._tree();
  }

  // Who reads whom. A removed node reads what it read, as far as that is still drawn.
  _connect() {
    for (const node of this._nodes.values()) {
      node.inputs = node.record.inputs.map((name) => this._find(name, node.removed)).filter(Boolean);
      node.readers = [];
    }
    for (const node of this._nodes.values()) for (const input of node.inputs) input.readers.push(node);
  }

  _find(name, removed) {
    const [first, second] = removed ? ["r:", "n:"] : ["n:", "r:"];
    return this._nodes.get(first + name) || (removed ? this._nodes.get(second + name) : undefined);
  }

  _tree() {
    const root = { id: "m:", path: "", label: "", kind: "", children: [], nodes: [], parent: null };
    const blocks = new Map([["", root]]);
    const blockOf = (path) => {
      if (blocks.has(path)) return blocks.get(path);
      let above = path;
      do above = above.slice(0, Math.max(0, above.lastIndexOf(".")));
      while (above && !(above in this.record.modules));
      const parent = blockOf(above);
      const label = above ? path.slice(above.length + 1) : path;
      const block = { id: `m:${path}`, path, label, kind: this.record.modules[path] || "", children: [], nodes: [], parent };
      blocks.set(path, block);
      parent.children.push(block);
      return block;
    };
    for (const node of this._nodes.values()) {
      node.block = blockOf(node.record.kind === "op" ? node.record.module : "");
      node.block.children.push(node);
    }
    this._group(blocks);
    this._flatten(root);
    this._sum(root);
    this._blocks = new Map();
    const enter = (block) => {
      this._blocks.set(block.id, block);
      for (const child of block.children) if (child.children) enter(child);
    };
    enter(root);
    return root;
  }

  // Nodes that no weight has gone into yet make masks and positions: a block of their own in a module that has others.
  _group(blocks) {
    const computed = new Set();
    for (const node of this._nodes.values()) {
      const isWeight = node.record.uses.length || node.record.makes;
      if (isWeight || node.inputs.some((input) => computed.has(input.id))) computed.add(node.id);
    }
    for (const block of [...blocks.values()]) {
      if (!block.children.some((child) => child.children)) continue;
      const early = block.children.filter((c) => !c.children && c.record.kind === "op" && !computed.has(c.id) && !c.removed);
      if (early.length < GROUPED_FROM) continue;
      const gone = block.children.filter((c) => !c.children && c.removed && !computed.has(c.id));
      const members = new Set([...early, ...gone]);
      const group = {
        id: `p:${block.path}`, path: block.path, label: PREPARATION, kind: "masks, positions", children: [...members],
        nodes: [], parent: block,
      };
      for (const node of members) node.block = group;
      const at = block.children.findIndex((child) => members.has(child));
      block.children = block.children.filter((child) => !members.has(child));
      block.children.splice(at, 0, group);
    }
  }

  // A module around a single thing adds nothing: the thing takes its name.
  _flatten(block) {
    for (let i = 0; i < block.children.length; i++) {
      let child = block.children[i];
      if (!child.children) continue;
      this._flatten(child);
      if (child.children.length === 1) {
        const only = child.children[0];
        const label = only.children ? `${child.label}.${only.label}` : child.label;
        only.label = label;
        if (only.children) only.parent = block;
        else only.block = block;
        block.children[i] = only;
      }
    }
  }

  // All nodes below each block, in the order of the graph.
  _sum(block) {
    block.nodes = [];
    for (const child of block.children) {
      if (child.children) this._sum(child);
      block.nodes.push(...(child.children ? child.nodes : [child]));
    }
    const count = (test) => block.nodes.reduce((total, node) => total + (test(node) ? 1 : 0), 0);
    block.changes = {
      added: count((node) => this.changeOf(node) === "added"),
      removed: count((node) => node.removed),
      rewritten: count((node) => this.changeOf(node) === "rewritten"),
    };
    block.users = block.nodes.filter((node) => node.record.uses.length && !node.removed);
  }

  changeOf(node) {
    if (node.removed) return "removed";
    if (this.added.has(node.record.name)) return "added";
    return this.rewritten.has(node.record.name) ? "rewritten" : null;
  }

  // The path of blocks from the root to a node or a block, without itself.
  ancestors(item) {
    const path = [];
    for (let block = item.children ? item.parent : item.block; block; block = block.parent) path.unshift(block);
    return path;
  }

  // Blocks to open so that a model's repeated layers are seen, or, where there are none, its first level.
  initiallyOpen() {
    const open = new Set(["m:"]);
    const isNumbered = (child) => child.children && /^(.*\.)?\d+$/.test(child.label);
    for (const block of this.blocks.values()) {
      const above = [...this.ancestors(block), block];
      if (above.some(isNumbered) || block.children.filter(isNumbered).length < 2) continue;
      for (const each of above) open.add(each.id);
    }
    const [only, ...others] = this.root.children.filter((child) => child.children);
    if (open.size === 1 && only && !others.length) open.add(only.id);
    return open;
  }

  // ---- figures ------------------------------------------------------------------------------------------------------

  weightsOf(node) {
    const names = node.record.uses.length ? node.record.uses : node.record.makes ? [node.record.makes] : [];
    return node.removed ? [] : names.map((name) => this.weights.get(name)).filter(Boolean);
  }

  elementsOf(node) {
    return sum(this.weightsOf(node).map((weight) => weight.shape[0] * weight.shape[1]));
  }

  bitsOf(node) {
    const weights = this.weightsOf(node);
    return weights.length ? (8 * sum(weights.map((w) => w.bytes))) / Math.max(1, this.elementsOf(node)) : null;
  }

  weightErrorOf(node) {
    const known = this.weightsOf(node).map((weight) => number(weight.sqnr)).filter((value) => value !== null);
    return known.length ? Math.min(...known) : null;
  }

  valueErrorOf(node) {
    const error = node.removed ? undefined : this.errors.get(node.record.name);
    return error === undefined ? null : error;
  }

  bytesOf(node) {
    return node.removed ? 0 : sum(node.record.tensors.map((tensor) => tensor[3]));
  }

  timeOf(node) {
    const time = node.removed || node.record.kind !== "op" ? undefined : this.times.get(node.record.name);
    return time === undefined ? null : time;
  }

  // A colouring's value of a node, or of all nodes of a block together; null where there is none.
  valueOf(item, colouring) {
    if (!item.children) return colouring.of(this, item);
    const values = [];
    const elements = [];
    for (const node of colouring === COLOURINGS.bits ? item.users : item.nodes) {
      const value = colouring.of(this, node);
      if (value === null) continue;
      values.push(value);
      elements.push(this.elementsOf(node));
    }
    return values.length ? colouring.join(values, elements) : null;
  }

  // The least and the largest value that a node or a weight has.
  rangeOf(colouring) {
    let [low, high] = [Infinity, 0];
    for (const node of this.nodes.values()) {
      for (const of of [colouring.of, ...(colouring.ofWeight && node.record.uses.length ? [colouring.ofWeight] : [])]) {
        const value = of(this, node);
        if (value === null || value <= 0) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    return high ? [low, high] : [0, 0];
  }
}
