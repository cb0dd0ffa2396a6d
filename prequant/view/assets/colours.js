// Colourings: what a box is coloured by, in which colours, and the legend that says so.
// All scales are ones that colour-blind people can read: viridis, cividis, and red-yellow-blue.

const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const RED_TO_BLUE = ["#a50026", "#d73027", "#f46d43", "#fdae61", "#fee090", "#e0f3f8", "#abd9e9", "#74add1", "#4575b4"];
const EXACT = "#8d93a1";

const DECIBELS = [5, 45]; // below: hardly the same signal; above: as good as the original

function channels(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// The colour at a share (0 to 1) of a scale.
function along(scale, share) {
  const place = Math.min(1, Math.max(0, share)) * (scale.length - 1);
  const low = Math.min(Math.floor(place), scale.length - 2);
  const [first, second] = [channels(scale[low]), channels(scale[low + 1])];
  const mixed = first.map((value, i) => Math.round(value + (second[i] - value) * (place - low)));
  return "#" + mixed.map((value) => value.toString(16).padStart(2, "0")).join("");
}

// Black or white, whichever stands out more on a colour (relative luminance as in WCAG 2).
function inkOn(hex) {
  const [r, g, b] = channels(hex).map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#101418" : "#ffffff";
}

// A number with so many significant digits, or all of its whole part: 0.0123, 1.23, 123, 1234 (not 1.23e+3).
function significant(value, digits) {
  const size = Math.abs(value);
  if (size >= 10 ** digits - 0.5) return value.toFixed(0);
  return value.toPrecision(digits);
}

function formatBytes(bytes) {
  if (bytes < 1000) return `${Math.round(bytes)} B`;
  const [size, unit] = bytes < 1e6 ? [bytes / 1e3, "kB"] : bytes < 1e9 ? [bytes / 1e6, "MB"] : [bytes / 1e9, "GB"];
  return `${significant(size, 3)} ${unit}`;
}

function formatSeconds(seconds) {
  if (seconds < 1e-3) return `${significant(seconds * 1e6, 2)} µs`;
  return seconds < 1 ? `${significant(seconds * 1e3, 3)} ms` : `${significant(seconds, 3)} s`;
}

const formatBits = (bits) => `${bits.toFixed(bits < 10 ? 2 : 1).replace(/\.?0+$/, "")} bit`;
const formatDecibels = (value) => (value === Infinity ? "exact" : `${value.toFixed(1)} dB`);

const least = (values) => Math.min(...values);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const bitsShare = (bits) => Math.log2(Math.max(1, bits)) / 5;
const decibelShare = (value) => (value - DECIBELS[0]) / (DECIBELS[1] - DECIBELS[0]);
const decibelColour = (value) => (value === Infinity ? EXACT : along(RED_TO_BLUE, decibelShare(value)));

// `of`: the value of a node, or null; `ofWeight`: that of the weight which a node computes with, where it is another one;
// `join`: that of several nodes; `text`: how it is written.
const COLOURINGS = {
  bits: {
    title: "Bits",
    help: "bits stored per weight, all told",
    of: (model, node) => model.bitsOf(node),
    join: (values, elements) => sum(values.map((v, i) => v * elements[i])) / sum(elements),
    text: formatBits,
    colour: (value) => along(VIRIDIS, bitsShare(value)),
    legend: () => [1, 2, 4, 8, 16, 32].map((bits) => [along(VIRIDIS, bitsShare(bits)), `${bits}`]),
  },
  weights: {
    title: "Weight error",
    help: "SQNR of weights (of blocks: the worst)",
    of: (model, node) => model.weightErrorOf(node),
    join: least,
    text: formatDecibels,
    colour: decibelColour,
    legend: () => decibelLegend(),
  },
  values: {
    title: "Value error",
    help: "SQNR of values (of blocks: the worst)",
    of: (model, node) => model.valueErrorOf(node),
    join: least,
    text: formatDecibels,
    colour: decibelColour,
    legend: () => decibelLegend(),
  },
  bytes: {
    title: "Bytes",
    help: "bytes of tensors read",
    of: (model, node) => model.bytesOf(node) || null,
    ofWeight: (model, node) => sum(model.weightsOf(node).map((weight) => weight.bytes)) || null,
    join: sum,
    text: formatBytes,
    colour: (value, range) => along(CIVIDIS, logShare(value, range)),
    legend: (range) => rangeLegend(range, formatBytes),
  },
  time: {
    title: "Time",
    help: "median time, op by op",
    of: (model, node) => model.timeOf(node),
    ofWeight: (model, node) => (node.record.target === "operator.getitem" ? null : model.timeOf(node)), // of several in one op
    join: sum,
    text: formatSeconds,
    colour: (value, range) => along(CIVIDIS, logShare(value, range)),
    legend: (range) => rangeLegend(range, formatSeconds),
  },
};

function logShare(value, [low, high]) {
  return high > low ? Math.log(value / low) / Math.log(high / low) : 1;
}

function decibelLegend() {
  const marks = [5, 15, 25, 35, 45].map((value) => [decibelColour(value), `${value}`]);
  marks[0][1] = "≤ 5 dB";
  marks[marks.length - 1][1] = "≥ 45 dB";
  return [...marks, [EXACT, "exact"]];
}

function rangeLegend([low, high], text) {
  if (!(high > 0)) return [];
  return [0, 0.25, 0.5, 0.75, 1].map((share) => [along(CIVIDIS, share), text(low * (high / low) ** share)]);
}
