// One run on its own: what it was told, what it found, how to make it again. Opened when somebody asks for it.

function folded(title, content, isOpen = false) {
  return element("details", { open: isOpen }, element("summary", {}, title), content);
}

function part(title, ...content) {
  return element("section", { class: "part" }, element("h3", {}, title), ...content);
}

function facts(run, told) {
  const rows = [
    ["Stage", run.stage],
    ["State", stateMark(run.state)],
    ["Mark", run.mark],
    ["Times", told.clock],
    ["Began", run.began],
    ["Took", run.seconds === null ? "" : `${spoken(run.seconds)} s`],
    ["Version", told.version],
    ["Read from", run.source === "folder" ? "" : run.source],
    ["Folder", element("code", {}, told.folder)],
  ].filter(([, value]) => value);
  return element("dl", {}, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function again(told) {
  if (!told.command) {
    if (told.left_out) return null;
    return part("To make it again", element("p", {}, "What was typed is not known: its overrides are missing."));
  }
  const code = element("code", {}, told.command);
  const place = told.typed_in ? element("p", { class: "quiet" }, "Typed in ", element("code", {}, told.typed_in)) : null;
  return part("To make it again", element("div", { class: "command", tabindex: 0 }, code, copyButton(told.command, "the command")), place);
}

function difference(run) {
  const rows = data.columns.filter((column) => column.kind === "setting")
    .map((column) => [column.name, run.cells[data.columns.indexOf(column)]])
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => [name, String(value)]);
  return rows.length ? part("Where runs differ, this one has", plainTable(["setting", "value"], rows, "Settings that differ between runs", "pairs")) : null;
}

function numbers(told) {
  const rows = Object.entries(told.metrics);
  return rows.length ? part("Numbers", plainTable(["metric", "value"], rows, "Metrics", "pairs")) : null;
}

function lists(told) {
  const made = [];
  const list = (title, items) => items.length && made.push(part(title, element("ul", {}, ...items.map((item) => element("li", {}, item)))));
  list("Warnings", told.warnings);
  list("What could not be read", told.notes);
  return made;
}

function pages(told) {
  return told.pages.map(([name, markup]) => {
    const box = element("div", { class: "page box" });
    box.innerHTML = markup; // made by a Markdown renderer that escapes all markup of the text
    return part(name, box);
  });
}

function tables(told) {
  if (!told.tables.length) return null;
  return part("Tables", ...told.tables.map((one) => {
    if (one.why) return element("p", { class: "quiet" }, `${one.name} cannot be read: ${one.why}`);
    const note = one.rows.length < one.of ? element("p", { class: "quiet" }, `The first ${one.rows.length} of ${one.of.toLocaleString("en")} rows.`) : null;
    const body = element("div", {}, note, plainTable(one.columns, one.rows, one.name));
    return folded(`${one.name} (${plural(one.of, "row")})`, body);
  }));
}

function pictures(told) {
  if (!told.pictures.length) return null;
  return part("Pictures", element("div", { class: "pictures" }, ...told.pictures.map((one) => {
    const address = one.svg === undefined ? `data:image/png;base64,${one.png}`
      : `data:image/svg+xml;charset=utf-8,${encodeURIComponent(one.svg)}`; // as an image it can run nothing
    return element("figure", {}, element("img", { src: address, alt: one.name.replaceAll("_", " ") }),
      element("figcaption", {}, one.name));
  })));
}

function lineage(told) {
  if (!told.lineage.length) return null;
  return part("What it stood on", element("ul", { class: "lineage" }, ...told.lineage.map(([name, from]) =>
    element("li", {}, element("code", {}, name), from ? ` from ${from}` : ""))));
}

function rest(told) {
  const settings = [...Object.entries(told.settings), ...data.common.filter(([name]) => told.has_common.includes(name))];
  const made = [];
  if (settings.length) {
    const rows = settings.map(([name, value]) => [name, String(value ?? "not set")]).sort(([left], [right]) => left.localeCompare(right));
    made.push(folded(`All settings (${rows.length})`, plainTable(["setting", "value"], rows, "All settings", "pairs")));
  }
  if (told.log) made.push(folded("Log", element("pre", { class: "box", tabindex: 0 }, told.log)));
  return made.length ? part("Settings and log", ...made) : null;
}

function neighbours(at) {
  const places = view.rows.flatMap((row) => row.runs);
  const here = places.indexOf(at);
  const link = (place, word) => places[place] === undefined || here < 0 ? null
    : element("a", { href: `#run-${data.runs[places[place]].id}` }, word);
  byId("around").replaceChildren(...[link(here - 1, "Previous"), link(here + 1, "Next")].filter(Boolean));
}

async function showRun(at) {
  const run = data.runs[at];
  byId("run-title").textContent = `${run.stage} ${run.name}`;
  neighbours(at);
  const box = byId("run");
  box.replaceChildren(element("p", { role: "status" }, "Opening"));
  let told;
  try {
    told = await unpackedJson(`packed-run-${at}`);
  } catch (error) {
    box.replaceChildren(element("p", { class: "notice" }, `This browser cannot open what is packed in the page (${error.message}). report.md beside it holds the tables.`));
    return;
  }
  if (currentAddress() !== `run-${run.id}`) return; // the reader went on meanwhile
  const message = run.message ? element("p", { class: "notice" }, told.message || run.message) : null;
  const parts = [message, facts(run, told), again(told), ...lists(told), ...pages(told),
    element("div", { class: "beside" }, ...[difference(run), numbers(told)].filter(Boolean)), pictures(told), tables(told), lineage(told), rest(told)];
  if (told.left_out) parts.push(element("p", { class: "quiet" }, told.left_out));
  box.replaceChildren(...parts.filter(Boolean));
}
