// The table of runs: sorted, filtered, with seeds apart or together. It draws no chart.

const AT_FIRST = 200; // rows; more are there, and shown when asked for
const view = { sort: "fixed began", down: true, all: false, hidden: new Set(), rows: [], runs: new Set() };
const FIXED = [
  { name: "run", kind: "fixed", of: (row) => row.name },
  { name: "stage", kind: "fixed", of: (row) => row.stage },
  { name: "state", kind: "fixed", of: (row) => row.state },
];
const LAST = [
  { name: "began", kind: "fixed", of: (row) => row.began },
  { name: "took_s", kind: "fixed", isNumber: true, of: (row) => row.seconds },
];
const COLUMNS = [
  ...FIXED,
  ...data.columns.map((column, at) => ({ ...column, at, of: (row) => row.cells[at] })),
  ...LAST,
].map((column) => ({ ...column, key: `${column.kind} ${column.name}` })); // a metric may be called as a setting is

function singleRows() {
  return data.runs.map((run, at) => ({ ...run, runs: [at] }));
}

// One row per group: means, their intervals, and the seeds that they are of.
function groupRows() {
  return data.groups.map((group) => {
    const first = data.runs[group.runs[0]];
    const states = [...new Set(group.runs.map((at) => data.runs[at].state))];
    const several = group.runs.length > 1;
    return {
      ...first,
      ...group, // of several its own name, mark, means
      state: states.length === 1 ? states[0] : "mixed",
      seconds: several ? null : first.seconds,
    };
  });
}

function isTogether() {
  return byId("seeds").checked;
}

function textOf(row) {
  row.text ??= COLUMNS.map((column) => column.of(row) ?? "").concat(row.mark, row.message).join("\n").toLowerCase();
  return row.text;
}

// "markov", "predictor:markov", "tpot_ms<9", "seed=1"
function condition(word) {
  const found = word.match(/^([\w.]+)(<=|>=|<|>|=|:)(.+)$/);
  const column = found && COLUMNS.find((one) => one.name === found[1]);
  if (!column) return (row) => textOf(row).includes(word.toLowerCase());
  const [, , sign, wanted] = found;
  const number = Number(wanted);
  if (sign === ":") return (row) => String(column.of(row) ?? "").toLowerCase().includes(wanted.toLowerCase());
  if (sign === "=") return (row) => String(column.of(row) ?? "") === wanted || (wanted !== "" && column.of(row) === number);
  return (row) => {
    const value = column.of(row);
    if (typeof value !== "number" || Number.isNaN(number)) return false;
    return { "<": value < number, ">": value > number, "<=": value <= number, ">=": value >= number }[sign];
  };
}

function order(left, right) {
  const isEmpty = [left, right].map((value) => value === null || value === undefined || value === "");
  if (isEmpty[0] || isEmpty[1]) return isEmpty[0] - isEmpty[1]; // always last
  const sign = view.down ? -1 : 1;
  if (typeof left === "number" && typeof right === "number") return sign * (left - right);
  return sign * String(left).localeCompare(String(right), "en", { numeric: true });
}

function chosenRows() {
  const tests = byId("filter").value.split(/\s+/).filter(Boolean).map(condition);
  const [stage, state] = [byId("stage").value, byId("state").value];
  const column = COLUMNS.find((one) => one.key === view.sort) || COLUMNS[0];
  return (isTogether() ? groupRows() : singleRows())
    .filter((row) => (!stage || row.stage === stage) && (!state || row.state === state))
    .filter((row) => tests.every((test) => test(row)))
    .sort((left, right) => order(column.of(left), column.of(right)) || left.runs[0] - right.runs[0]);
}

// How many different things the rows say in a column, and what more than half of them say.
function spread(column, rows) {
  const counts = new Map();
  for (const row of rows) {
    const value = column.of(row);
    if (![null, undefined, ""].includes(value)) counts.set(value, (counts.get(value) || 0) + 1);
  }
  const usual = [...counts].find(([, count]) => 2 * count > rows.length);
  return { different: counts.size, hasUsual: Boolean(usual), usual: usual?.[0] };
}

// Columns that the reader left on and that say something about these rows: a setting that all share says nothing.
function chosenColumns(rows) {
  const least = (column) => (column.kind === "setting" && rows.length > 1 ? 2 : 1);
  return COLUMNS.filter((column) => column.key === "fixed run" || !view.hidden.has(column.key))
    .map((column) => ({ ...column, ...spread(column, rows) }))
    .filter((column) => column.key === "fixed run" || column.different >= least(column));
}

function headCell(column) {
  const isSorted = view.sort === column.key;
  const button = element("button", { type: "button", "data-sort": column.key }, column.name,
    element("span", { class: "arrow", "aria-hidden": "true" }, isSorted ? (view.down ? "▼" : "▲") : ""));
  const note = column.note ? element("span", { class: "note" }, column.note) : null;
  const isNumber = column.kind === "metric" || column.isNumber;
  const direction = isSorted ? (view.down ? "descending" : "ascending") : "none";
  return element("th", { scope: "col", "aria-sort": direction, class: `${column.kind}${isNumber ? " number" : ""}` }, button, note);
}

function firstCell(row) {
  const links = row.runs.length > 1 ? element("span", { class: "seeds" }, ...row.runs.map((at) =>
    element("a", { href: `#run-${data.runs[at].id}`, title: data.runs[at].name }, `seed ${data.runs[at].seed ?? "?"}`))) : null;
  const mark = row.mark ? element("span", { class: "mark" }, row.mark) : null;
  return element("th", { scope: "row" }, element("a", { href: `#run-${row.id}` }, row.name), mark, links);
}

// Four digits, zeros too: numbers that stand in one column.
function even(value) {
  const isPlain = typeof value === "number" && !Number.isInteger(value) && Math.abs(value) >= 1e-3 && Math.abs(value) < 1e3;
  return isPlain ? value.toPrecision(4) : spoken(value);
}

function cell(column, row) {
  const value = column.of(row);
  if (column.key === "fixed state") return element("td", {}, stateMark(value));
  if (column.key === "fixed began") return element("td", {}, String(value ?? "").replace("T", " ").replace("+00:00", ""));
  const isNumber = column.kind === "metric" || typeof value === "number";
  const differs = column.kind === "setting" && column.name !== "seed" && column.hasUsual && value !== null && value !== column.usual;
  const text = isNumber && column.kind !== "setting" ? even(value) : String(value ?? ""); // settings as they were typed
  const made = element("td", { class: [isNumber && "number", differs && "differs"].filter(Boolean).join(" ") || null, title: text.length > 40 ? text : null }, text);
  if (column.kind === "metric" && row.low && row.low[column.at] !== null && row.low[column.at] < row.high[column.at]) {
    made.append(element("span", { class: "interval" }, ` [${even(row.low[column.at])} ${even(row.high[column.at])}]`));
  }
  return made;
}

function drawTable() {
  const rows = chosenRows();
  const columns = chosenColumns(rows);
  const shown = view.all ? rows : rows.slice(0, AT_FIRST);
  const body = shown.map((row) => element("tr", {}, firstCell(row),
    ...columns.slice(1).map((column) => cell(column, row))));
  const table = element("table", { class: "runs" }, element("caption", { class: "hidden" }, "Runs"),
    element("thead", {}, element("tr", {}, ...columns.map(headCell))), element("tbody", {}, ...body));
  byId("table-box").replaceChildren(rows.length ? table : element("p", { class: "empty" }, data.runs.length ? "No run fits the filter." : "There are no runs."));
  view.rows = rows;
  view.columns = columns;
  view.runs = new Set(rows.flatMap((row) => row.runs));
  byId("count").textContent = `${view.runs.size.toLocaleString("en")} of ${plural(data.runs.length, "run")}` +
    (isTogether() ? ` in ${plural(rows.length, "row")}` : "");
  byId("more").replaceChildren();
  if (shown.length < rows.length) {
    const button = element("button", { type: "button" }, `Show all ${rows.length.toLocaleString("en")} rows`);
    button.addEventListener("click", () => {
      view.all = true;
      drawTable();
    });
    byId("more").append(`The first ${shown.length} rows are shown. `, button);
  }
}

function quoted(value) {
  const text = value === null || value === undefined ? "" : String(value);
  const isFormula = typeof value === "string" && /^\s*[=+@\t\r\uff1d\uff0b\uff0d\uff20-]/.test(text); // a spreadsheet would compute it
  const safe = isFormula ? `'${text}` : text;
  return /[",;\t\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

// The rows and columns that are shown, in their order, with all digits; the marks always.
function csvText() {
  const head = ["mark", "times"], parts = [(row) => row.mark, (row) => row.clock];
  for (const column of view.columns) {
    head.push(column.name);
    parts.push((row) => column.of(row));
    if (isTogether() && column.kind === "metric") {
      head.push(`${column.name}_low`, `${column.name}_high`);
      parts.push((row) => row.low?.[column.at], (row) => row.high?.[column.at]);
    }
  }
  const lines = view.rows.map((row) => parts.map((part) => quoted(part(row))).join(","));
  return [head.map(quoted).join(","), ...lines].join("\r\n") + "\r\n";
}

function saveCsv() {
  const address = URL.createObjectURL(new Blob([csvText()], { type: "text/csv" }));
  const link = element("a", { href: address, download: "runs.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function fillChoices(id, values) {
  byId(id).append(element("option", { value: "" }, "all"), ...values.map((value) => element("option", { value }, value)));
}

function fillColumnMenu() {
  for (const column of COLUMNS.slice(1)) {
    const box = element("input", { type: "checkbox" });
    box.checked = column.shown !== false;
    if (!box.checked) view.hidden.add(column.key);
    box.addEventListener("change", () => {
      box.checked ? view.hidden.delete(column.key) : view.hidden.add(column.key);
      drawTable();
    });
    byId("column-list").append(element("label", { class: "check" }, box, ` ${column.name}`));
  }
}

function fillTable() {
  fillChoices("stage", [...new Set(data.runs.map((run) => run.stage))].sort());
  fillChoices("state", [...new Set(data.runs.map((run) => run.state))].sort());
  fillColumnMenu();
  byId("seeds-label").hidden = !data.groups.some((group) => group.seeds.length > 1);
  const more = COLUMNS.filter((column) => column.kind === "setting" && column.shown === false).map((column) => column.name);
  const told = more.length ? ` Also different, since something else was chosen: ${more.join(", ")} (under Columns).` : "";
  byId("legend").textContent = data.legend + told;
  byId("table-box").addEventListener("click", (event) => {
    const name = event.target.closest("button[data-sort]")?.dataset.sort;
    if (!name) return;
    view.down = view.sort === name ? !view.down : false;
    view.sort = name;
    drawTable();
    byId("table-box").querySelector(`button[data-sort="${CSS.escape(name)}"]`).focus();
  });
  let waiting = 0;
  byId("filter").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(drawTable, 60); // not at every key of a fast typist
  });
  for (const id of ["stage", "state", "seeds"]) byId(id).addEventListener("change", drawTable);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("csv").addEventListener("click", saveCsv);
  byId("columns").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    byId("columns").open = false;
    byId("columns").firstElementChild.focus();
  });
  drawTable();
}
