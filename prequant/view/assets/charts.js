// Histograms of a weight's values and of its codes.

const CHART = { w: 356, h: 132, base: 108, top: 8 };

// Heights go by the logarithm of the count: a handful of outliers would not be seen beside millions of others.
const heightOf = (value, most) => (value ? ((CHART.base - CHART.top) * Math.log1p(value)) / Math.log1p(most) : 0);

function valueChart(weight) {
  const { low, high, original, current, outliers } = weight.histogram;
  const most = Math.max(...current, ...(original || [0]));
  const width = CHART.w / current.length;
  const xOf = (value) => ((value - low) / (high - low)) * CHART.w;
  const bar = (kind, value, i) => {
    const height = heightOf(value, most);
    return shape("rect", { class: kind, x: (i * width + 0.4).toFixed(2), y: (CHART.base - height).toFixed(2), width: (width - 0.8).toFixed(2), height: height.toFixed(2) });
  };
  const bars = current.flatMap((value, i) => (value ? [bar("bar", value, i)] : []));
  const far = (outliers || []).flatMap((value, i) => (value ? [bar("outlier", value, i)] : []));
  const levels = weight.levels
    .filter((level) => level >= low && level <= high)
    .map((level) => shape("line", { class: "level", x1: xOf(level).toFixed(2), x2: xOf(level).toFixed(2), y1: CHART.base + 1, y2: CHART.base + 9 }));
  const parts = [...bars, ...far, ...(original ? [outline(original, most, width)] : []), ...levels, ...axis(low, high, xOf)];
  const keys = [
    ["bar", "values now"], ...(original ? [["before", "original"]] : []), ...(outliers ? [["outlier", "outliers"]] : []),
    ...(weight.levels.length ? [["level", "levels at the median scale"]] : []),
  ];
  return chart("Values", `Histogram of values from ${significant(low, 3)} to ${significant(high, 3)}`, parts, keys);
}

function outline(counts, most, width) {
  let path = `M0,${CHART.base}`;
  counts.forEach((value, i) => {
    const y = (CHART.base - heightOf(value, most)).toFixed(2);
    path += `L${(i * width).toFixed(2)},${y}L${((i + 1) * width).toFixed(2)},${y}`;
  });
  return shape("path", { class: "before", d: `${path}L${CHART.w},${CHART.base}` });
}

function axis(low, high, xOf) {
  const marks = [[low, "start", 0], [high, "end", CHART.w]];
  if (low < 0 && high > 0 && xOf(0) > 60 && xOf(0) < CHART.w - 60) marks.push([0, "middle", xOf(0)]);
  return [
    shape("line", { class: "axis", x1: 0, x2: CHART.w, y1: CHART.base, y2: CHART.base }),
    ...marks.map(([value, anchor, x]) => {
      const words = shape("text", { x, y: CHART.h - 6, "text-anchor": anchor });
      words.textContent = value === 0 ? "0" : significant(value, 3);
      return words;
    }),
  ];
}

function codeChart(weight) {
  const { codes } = weight;
  const most = Math.max(...codes);
  const width = CHART.w / codes.length;
  const bars = codes.map((value, i) => {
    const height = ((CHART.base - CHART.top) * value) / Math.max(1, most);
    const rect = shape("rect", { class: "bar", x: (i * width + width * 0.06).toFixed(2), y: (CHART.base - height).toFixed(2), width: (width * 0.88).toFixed(2), height: height.toFixed(2) }, tooltip(`code ${i}: ${count(value)}`));
    return rect;
  });
  const label = (words, x, anchor) => {
    const element = shape("text", { x, y: CHART.h - 10, "text-anchor": anchor });
    element.textContent = words;
    return element;
  };
  const parts = [...bars, shape("line", { class: "axis", x1: 0, x2: CHART.w, y1: CHART.base, y2: CHART.base }), label("0", 0, "start"), label(String(codes.length - 1), CHART.w, "end")];
  const unused = codes.filter((value) => !value).length;
  return chart("Codes", `How often each of ${codes.length} codes occurs`, parts, [["bar", `${codes.length} codes${unused ? `, ${unused} of them unused` : ", all used"}`]]);
}

function chart(title, description, parts, keys) {
  const svg = shape("svg", { class: "chart", viewBox: `0 0 ${CHART.w} ${CHART.h}`, role: "img", "aria-label": description }, ...parts);
  const legend = keys.map(([kind, words]) => make("span", {}, make("i", { class: kind }), words));
  return make("figure", { class: "figure" }, make("h3", {}, title === "Values" ? "Values (counts on a log scale)" : "Codes (counts)"), svg, make("div", { class: "keys" }, ...legend));
}
