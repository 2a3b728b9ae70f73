// Any number of the runs against any other, or against any setting that differs: a point per row of the table.

const explorer = { plot: null, choices: {} };

// Columns that tell rows apart; numbers only, where an axis needs them.
function tellingColumns(isNumeric) {
  return COLUMNS.filter((column) => (column.kind === "metric" || (column.kind === "setting" && !isNumeric)) &&
    spread(column, data.runs.map((run, at) => ({ ...run, runs: [at] }))).different > 1);
}

function canExplore() {
  return data.runs.length > 1 && tellingColumns(true).length > 0 && tellingColumns(false).length > 1;
}

function choiceOf(name, title, columns, first) {
  const options = columns.map((column) => element("option", { value: column.key }, column.name));
  const box = element("select", { id: `explore-${name}` }, ...(name === "colour" ? [element("option", { value: "" }, "one colour")] : []), ...options);
  box.value = first?.key ?? "";
  box.addEventListener("change", drawExplorer);
  explorer.choices[name] = box;
  return element("label", {}, `${title} `, box);
}

function makeExplorer() {
  if (!canExplore()) return;
  const all = tellingColumns(false), numbers = tellingColumns(true);
  const y = numbers.find((column) => column.shown !== false) ?? numbers[0];
  const rows = exploredRows(y, y);
  const settings = all.filter((column) => column.kind === "setting" && column.shown !== false && column.name !== "seed");
  const telling = settings.filter((column) => spread(column, rows).different > 1);
  const x = telling.find((column) => rows.some((row) => typeof column.of(row) === "number")) ?? telling[0] ?? all[0];
  explorer.plot = element("div", { class: "plot", role: "group", "aria-label": "Any two numbers: they stand in the table of runs" });
  explorer.legend = element("p", { class: "keys" });
  byId("charts").append(element("article", { class: "chart", id: "chart-explore" }, element("h3", {}, "Any two numbers"),
    element("div", { class: "tools" },
      choiceOf("x", "Across", all, x),
      choiceOf("y", "Up", numbers, y),
      choiceOf("colour", "Colour", settings, telling.find((column) => column !== x))),
    explorer.plot, explorer.legend,
    element("p", { class: "quiet" }, "A point is a row of the table of runs, as it is filtered; a click opens the run.")));
  drawExplorer();
}

function exploredRows(x, y) {
  const has = (column, row) => ![null, undefined, ""].includes(column.of(row));
  return view.rows.filter((row) => has(x, row) && has(y, row));
}

function exploredTrace(rows, x, y, ink, symbol, name) {
  const ends = rows.map((row) => (row.low && row.low[y.at] !== null ? [row.low[y.at], row.high[y.at]] : null));
  const said = (column, row) => `${plain(column.name)}${column.note ? ` (${plain(row.clock || column.note)})` : ""}: ${plain(spoken(column.of(row)))}`;
  return {
    type: "scatter", mode: "markers", name: plain(name), hoverinfo: "text",
    x: rows.map((row) => (typeof x.of(row) === "number" ? x.of(row) : plain(x.of(row)))), y: rows.map((row) => y.of(row)),
    text: rows.map((row) => `<b>${plain(row.stage)} ${plain(row.name)}</b>${row.mark ? ` (${plain(row.mark)})` : ""}<br>${said(y, row)}<br>${said(x, row)}`),
    customdata: rows.map((row) => row.id),
    marker: { color: ink, symbol: rows.map((row) => symbol + (row.mark ? "-open" : "")), size: 8, line: { width: 1.5, color: ink } },
    error_y: ends.some(Boolean) ? {
      type: "data", color: ink, thickness: 1, width: 3,
      array: ends.map((end, at) => (end ? end[1] - y.of(rows[at]) : 0)), arrayminus: ends.map((end, at) => (end ? y.of(rows[at]) - end[0] : 0)),
    } : undefined,
  };
}

async function drawExplorer() {
  if (!explorer.plot || !window.Plotly) return;
  const [x, y, by] = ["x", "y", "colour"].map((name) => COLUMNS.find((column) => column.key === explorer.choices[name].value));
  const rows = exploredRows(x, y);
  const names = by ? [...new Set(rows.map((row) => String(by.of(row) ?? "not set")))].sort((a, b) => a.localeCompare(b, "en", { numeric: true })) : [""];
  const looks = names.map((name) => ({ name }));
  const traces = names.map((name, at) => {
    const { colour: ink, symbol } = look(looks[at], looks);
    return exploredTrace(by ? rows.filter((row) => String(by.of(row) ?? "not set") === name) : rows, x, y, ink, symbol, name);
  });
  explorer.legend.replaceChildren(...(by ? looks.map((one) => element("span", { class: "key" }, swatch(one, looks), one.name)) : []));
  const title = (column) => (column.note ? `${column.name} (${column.note})` : column.name);
  await put(explorer.plot, traces, layoutOf(explorer.plot, { x: title(x), y: title(y), shares: "" }, []));
  explorer.plot.removeAllListeners("plotly_click");
  explorer.plot.on("plotly_click", (event) => {
    location.hash = `#run-${event.points[0].customdata}`;
  });
}
