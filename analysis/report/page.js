// The page itself: its data, its addresses, its colours, printing. What comes from runs is put in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SECTIONS = [
  ["runs", "Runs"],
  ["figures", "Figures"],
  ["settings", "Settings"],
  ["problems", "Problems"],
  ["about", "About"],
];
const THEMES = [
  ["auto", "as the system"],
  ["light", "light"],
  ["dark", "dark"],
];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function spoken(value) {
  if (value === null || value === undefined || value === "") return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en", { useGrouping: Math.abs(value) >= 1e4 });
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-4)) return value.toExponential(3);
  return String(Number(size >= 1000 ? value.toFixed(1) : value.toPrecision(4)));
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

// What is packed in the page: gzip in base64, opened when somebody looks at it.
async function unpacked(id) {
  const letters = atob(byId(id).textContent.trim());
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at += 1) bytes[at] = letters.charCodeAt(at); // a callback takes ten times as long
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function unpackedJson(id) {
  return JSON.parse(await unpacked(id));
}

// A plain table of values; numbers stand to the right.
function plainTable(columns, rows, caption, kind = "") {
  const isNumber = columns.map((_, at) => rows.some((row) => typeof row[at] === "number"));
  const head = element("tr", {}, ...columns.map((name, at) =>
    element("th", { scope: "col", class: isNumber[at] ? "number" : null }, String(name))));
  const body = rows.map((row) => element("tr", {}, ...row.map((value, at) =>
    element("td", { class: isNumber[at] ? "number" : null, title: String(value ?? "").length > 40 ? value : null }, spoken(value)))));
  const table = element("table", {}, element("caption", { class: "hidden" }, caption),
    element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: `box ${kind}`, role: "region", "aria-label": caption, tabindex: 0 }, table);
}

function stateMark(state) {
  return element("span", { class: `state state-${state}` }, state);
}

function copyButton(text, name) {
  const button = element("button", { type: "button", class: "copy", "aria-label": `Copy ${name}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      const range = document.createRange(); // no right to the clipboard: it is selected instead
      range.selectNodeContents(button.previousElementSibling);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected";
    }
  });
  return button;
}

// ---- addresses: #runs, #figures, ..., #run-NAME

let leftRun = ""; // where the reader comes back from

function currentAddress() {
  return location.hash.slice(1) || "runs"; // addresses of ours have letters, digits and dashes only
}

function show(isFirst) {
  const address = currentAddress();
  const run = data.runs.findIndex((one) => `run-${one.id}` === address);
  const isKnown = SECTIONS.some(([name]) => name === address);
  const wanted = run >= 0 ? "run" : isKnown ? address : "runs";
  for (const section of document.querySelectorAll("main > section")) {
    section.hidden = section.id !== `section-${wanted}`;
  }
  for (const link of byId("sections").querySelectorAll("a")) {
    const isHere = link.hash === `#${wanted === "run" ? "runs" : wanted}`;
    isHere ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  if (wanted === "run") showRun(run);
  if (wanted === "figures") showCharts();
  if (isFirst) return;
  window.scrollTo(0, 0);
  const origin = wanted === "runs" && leftRun ? byId("table-box").querySelector(`a[href="#${leftRun}"]`) : null;
  leftRun = wanted === "run" ? address : "";
  if (origin) origin.focus(); // in the row that was opened, not at the top again
  else byId(`${wanted}-title`).focus({ preventScroll: true });
}

function makeNavigation() {
  const problems = data.problems.length;
  for (const [name, title] of SECTIONS) {
    if (name === "figures" && !(data.charts.length || canExplore())) continue;
    if (name === "problems" && !problems) continue;
    const count = { runs: data.runs.length, figures: data.charts.length + Number(canExplore()), problems }[name];
    const told = count === undefined ? null : element("span", { class: "badge" }, count.toLocaleString("en"));
    byId("sections").append(element("a", { href: `#${name}` }, title, told));
  }
}

// ---- colours

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = `Theme: ${THEMES.find(([one]) => one === name)[1]}`;
  redrawCharts();
}

function rememberedTheme() {
  try {
    return localStorage.getItem("expert-prefetch-theme") || "auto";
  } catch {
    return "auto"; // a page from disk may have no memory
  }
}

function nextTheme() {
  const names = THEMES.map(([name]) => name);
  const name = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  try {
    localStorage.setItem("expert-prefetch-theme", name);
  } catch {
    /* as above */
  }
  setTheme(name);
}

// ---- what is the same, what went wrong

function fillSettings() {
  const box = byId("settings-list");
  if (data.common.length) {
    box.append(element("p", {}, `${plural(data.common.length, "setting")} with the same value in every run that has it.`),
      plainTable(["setting", "value"], data.common.map(([name, value]) => [name, String(value ?? "not set")]), "Settings that all runs share", "pairs"));
  } else {
    box.append(element("p", {}, "No setting is known of these runs."));
  }
  if (data.without_effect.length) {
    box.append(element("p", { class: "quiet" },
      `Also different, without an effect on numbers: ${data.without_effect.join(", ")}.`));
  }
}

function fillProblems() {
  byId("problems-list").append(element("ul", { class: "problems" }, ...data.problems.map((one) =>
    element("li", {}, one.id ? element("a", { href: `#run-${one.id}` }, one.place) : element("code", {}, one.place),
      element("p", {}, one.why)))));
}

// ---- printing: light, and with everything open

let beforePrint = null;

function openForPrint() {
  const closed = [...document.querySelectorAll("main > section:not([hidden]) details:not([open]):not(.menu, .chart details)")];
  beforePrint = { theme: document.documentElement.dataset.theme, closed };
  for (const one of closed) one.open = true;
  setTheme("light");
}

function closeAfterPrint() {
  if (!beforePrint) return;
  for (const one of beforePrint.closed) one.open = false;
  setTheme(beforePrint.theme);
  beforePrint = null;
}

function begin() {
  setTheme(rememberedTheme());
  fillTable();
  makeNavigation();
  fillSettings();
  fillProblems();
  byId("theme").addEventListener("click", nextTheme);
  window.addEventListener("hashchange", () => show(false));
  window.addEventListener("beforeprint", openForPrint);
  window.addEventListener("afterprint", closeAfterPrint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
  show(true);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}
