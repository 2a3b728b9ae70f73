// The charts: drawn when somebody looks at them, with the plotting library that is packed in the page.

const drawn = []; // { chart, box, variant, off }
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down"];
const DASHES = ["solid", "dash", "longdashdot"];
const AT_ONCE = 16; // series that are on to begin with
let library = null;

// As it is now, light or dark.
function colour(name) {
  const probe = element("span", { hidden: true });
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// Plotly reads some markup in texts: names from runs must have none, nor turn round what stands after them.
function plain(text) {
  return String(text).replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

async function loadLibrary() {
  const script = document.createElement("script");
  script.textContent = await unpacked("packed-library"); // the page's policy knows its sum
  document.head.append(script);
  if (!window.Plotly) throw new Error("the plotting library did not start");
}

// A series that stands beside another has its colour, without marks.
function look(series, all) {
  const base = all.findIndex((one) => one.name === (series.beside || series.name));
  const bases = all.filter((one) => !one.beside);
  const at = bases.indexOf(all[base]);
  const palette = Array.from({ length: 7 }, (_, one) => colour(`series-${one}`));
  return {
    colour: palette[at % palette.length],
    symbol: SYMBOLS[at % SYMBOLS.length] + (series.cheats ? "-open" : ""),
    isBare: Boolean(series.beside),
    dash: series.beside ? "dash" : series.cheats ? "dot" : DASHES[Math.floor(at / palette.length) % DASHES.length],
  };
}

function label(series) {
  return series.cheats ? `${series.name} (cheats)` : series.name;
}

function share(value, isShare) {
  return isShare ? `${(100 * value).toPrecision(4)} %` : spoken(value);
}

function hoverText(chart, series, at) {
  const [isX, isY] = ["x", "y"].map((axis) => chart.shares.includes(axis));
  const interval = series.low[at] === null ? ""
    : `<br>95 % over ${plain(series.over[at])}: ${share(series.low[at], isY)} to ${share(series.high[at], isY)}`;
  return `<b>${plain(label(series))}</b><br>${plain(chart.y)}${chart.times ? ` (${plain(chart.times)})` : ""}: ${share(series.y[at], isY)}${interval}<br>${plain(chart.x)}: ${share(series.x[at], isX)}`;
}

function wrapped(text, most) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length > most) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  return lines.map(plain).join("<br>");
}

function shownSeries(one) {
  return one.chart.variants[one.variant].filter((series) => series.runs.some((run) => view.runs.has(run)));
}

function trace(one, series) {
  const { colour: ink, symbol, dash, isBare } = look(series, one.chart.variants[one.variant]);
  const low = series.y.map((y, place) => (series.low[place] === null ? 0 : y - series.low[place]));
  const high = series.y.map((y, place) => (series.high[place] === null ? 0 : series.high[place] - y));
  const hasInterval = !isBare && series.low.some((value) => value !== null);
  return {
    type: "scatter",
    mode: isBare ? "lines" : one.chart.dots ? "markers" : "lines+markers",
    name: plain(label(series)),
    x: series.x,
    y: series.y,
    text: series.x.map((_, place) => hoverText(one.chart, series, place)),
    hoverinfo: "text",
    visible: !one.off.has(series.name),
    line: { color: ink, width: isBare ? 1.25 : 2, dash },
    marker: { color: ink, symbol, size: 7, line: { width: 1.5, color: ink } },
    error_y: hasInterval ? { type: "data", array: high, arrayminus: low, color: ink, thickness: 1, width: 3 } : undefined,
  };
}

// What no other cell beats on both axes: more saved, less slowed down.
function front(one, shown) {
  const points = shown.filter((series) => !series.cheats && !one.off.has(series.name))
    .flatMap((series) => series.x.map((x, at) => [x, series.y[at]])).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  const best = [];
  for (const point of points) if (!best.length || point[1] < best.at(-1)[1]) best.push(point);
  return {
    type: "scatter", mode: "lines", x: best.map(([x]) => x), y: best.map(([, y]) => y), hoverinfo: "skip",
    line: { color: colour("quiet"), width: 1.5, dash: "dash", shape: "hv" }, name: "not beaten",
  };
}

function axis(title, isShare, width, values = []) {
  const isWhole = !isShare && values.length && values.every(Number.isInteger);
  const isShort = isWhole && Math.max(...values) - Math.min(...values) <= 12;
  return {
    dtick: isShort ? 1 : undefined,
    title: { text: wrapped(title, width), font: { size: 13 } }, gridcolor: colour("line"), zerolinecolor: colour("line"),
    linecolor: colour("line"), tickcolor: colour("line"), tickformat: isShare ? ".0%" : undefined, automargin: true, nticks: 7,
  };
}

// What every plot shares: its colours, its size, how it answers.
function layoutOf(plot, chart, values) {
  const isNarrow = plot.clientWidth < 480;
  return {
    height: isNarrow ? 320 : 380, margin: { l: 16, r: 12, t: 28, b: 16 }, showlegend: false, hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("text") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("text"), size: 12 }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("accent") },
    xaxis: axis(chart.x, chart.shares.includes("x"), isNarrow ? 34 : 70, values),
    yaxis: axis(chart.y, chart.shares.includes("y"), 34),
  };
}

async function put(plot, traces, layout) {
  const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  await window.Plotly.react(plot, traces, layout, options);
  for (const drawing of document.querySelectorAll(".main-svg, .modebar svg, #js-plotly-tester")) {
    drawing.setAttribute("aria-hidden", "true"); // the numbers are a table
  }
}

async function draw(one) {
  const shown = shownSeries(one);
  const traces = shown.map((series) => trace(one, series));
  if (one.chart.front) traces.unshift(front(one, shown));
  drawLegend(one, shown);
  await put(one.plot, traces, layoutOf(one.plot, one.chart, shown.flatMap((series) => series.x)));
}

function swatch(series, all) {
  const { colour: ink, dash, isBare } = look(series, all);
  const pattern = { solid: "", dash: "5 3", longdashdot: "7 2 2 2", dot: "2 3" }[dash];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 26 10");
  svg.setAttribute("aria-hidden", "true");
  const add = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    svg.append(made);
  };
  add("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: ink, "stroke-width": 2, "stroke-dasharray": pattern });
  if (!isBare) add("circle", { cx: 13, cy: 5, r: 3.4, stroke: ink, "stroke-width": 1.5, fill: series.cheats ? colour("page") : ink });
  return svg;
}

function drawLegend(one, shown) {
  const all = one.chart.variants[one.variant];
  one.legend.replaceChildren(...shown.map((series) => {
    const isOn = !one.off.has(series.name);
    const button = element("button", { type: "button", "aria-pressed": String(isOn), "data-series": series.name }, swatch(series, all), element("span", {}, series.name), series.cheats ? element("span", { class: "mark" }, "cheats") : null);
    button.addEventListener("click", async () => {
      isOn ? one.off.add(series.name) : one.off.delete(series.name);
      await draw(one);
      one.legend.querySelector(`[data-series="${CSS.escape(series.name)}"]`)?.focus();
    });
    return button;
  }));
}

function numbersOf(one) {
  const rows = shownSeries(one).flatMap((series) => series.x.map((x, at) =>
    [label(series), x, series.y[at], series.low[at], series.high[at], series.over[at]]));
  return plainTable(["series", one.chart.x, one.chart.y, "low", "high", "interval over"], rows.slice(0, 2000), `Numbers of: ${one.chart.title}`);
}

function makeChart(chart) {
  const plot = element("div", { class: "plot", role: "group", "aria-label": `${chart.title}: the numbers stand below` });
  const legend = element("div", { class: "keys", role: "group", "aria-label": "Series that are shown" });
  const one = { chart, plot, legend, variant: Object.keys(chart.variants)[0], off: new Set() };
  const turnOff = () => {
    one.off = new Set(chart.variants[one.variant].slice(AT_ONCE).map((series) => series.name));
  };
  turnOff();
  const tag = chart.times ? element("span", { class: "mark" }, chart.times) : null;
  const head = element("h3", {}, chart.title, tag);
  const parts = [head];
  const names = Object.keys(chart.variants);
  if (names.length > 1) {
    const choice = element("select", { "aria-label": `What ${chart.title} shows` }, ...names.map((name) => element("option", { value: name }, name)));
    choice.addEventListener("change", () => {
      one.variant = choice.value;
      turnOff();
      draw(one);
    });
    parts.push(choice);
  }
  const table = element("details", {}, element("summary", {}, "The numbers"));
  table.addEventListener("toggle", () => table.open && table.replaceChildren(table.firstElementChild, numbersOf(one)));
  const box = element("article", { class: "chart", id: `chart-${chart.id}` }, ...parts, plot, legend, element("p", { class: "quiet" }, chart.note), table);
  return { one, box };
}

async function showCharts() {
  const several = view.runs.size === data.runs.length ? `all ${plural(data.runs.length, "run")}` : `the ${plural(view.runs.size, "run")} that the filter leaves`;
  byId("figures-said").textContent = `Of ${several}. Bars are 95 % intervals, over seeds where runs differ in nothing else. Dotted lines with open marks know what a real system cannot.`;
  try {
    library ??= Promise.all([loadLibrary(), unpackedJson("packed-charts")]);
    const [, charts] = await library;
    if (!byId("charts").hasChildNodes()) {
      for (const chart of charts) {
        const { one, box } = makeChart(chart);
        byId("charts").append(box);
        drawn.push(one);
      }
      makeExplorer();
    }
  } catch (error) {
    byId("charts").replaceChildren(element("p", { class: "notice" }, `This browser cannot draw the figures (${error.message}). report.md beside this page holds their numbers.`));
    return;
  }
  await redrawCharts();
}

async function redrawCharts() {
  if (byId("section-figures").hidden) return;
  for (const one of drawn) await draw(one);
  await drawExplorer();
  byId("charts").dataset.drawn = String(drawn.length);
}
