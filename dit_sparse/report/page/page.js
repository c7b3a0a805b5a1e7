const content = JSON.parse(part("content"));
const page = document.getElementById("page");
const kinds = { generate: "Generated videos", compare: "Methods compared", bench: "Kernel benchmark" };
let player = null;
let maps = null;

function makeHeader() {
  const headline = content.headline.map(([name, value]) =>
    make("div", { class: "card" }, make("dt", { text: name }), make("dd", { text: value })));
  const theme = labelled("Theme", ["system", "light", "dark"], 0, (index) => {
    document.documentElement.dataset.theme = ["", "light", "dark"][index];
    maps?.showMasks();
  });
  return make(
    "header",
    {},
    make("div", { class: "title" }, make("p", { class: "kind", text: `dit-sparse · ${kinds[content.kind]}` }), make("h1", { text: content.source })),
    theme,
    make("dl", { class: "cards" }, ...headline),
  );
}

function makeNotes() {
  if (!content.notes.length) return null;
  return make("section", { class: "notes", "aria-label": "Notes" }, ...content.notes.map((text) => make("p", { text })));
}

function makeGroups() {
  const groups = content.groups;
  if (!groups.length) return [];
  const title = make("div", { class: "section-head" });
  const stage = make("div");
  const mapped = make("div");
  const name = (group) => `${group.title} (${group.facts.map(([key, value]) => `${key} ${value}`).join(", ")})`;
  const chooser = groups.length > 1 ? labelled("Prompt", groups.map(name), 0, (i) => show(groups[i])) : null;
  const showMaps = (run) => {
    maps = run.trace ? new Maps(JSON.parse(part(run.trace)), run.label) : null;
    mapped.replaceChildren(maps ? maps.root : "", run.command ? makeCommands("How to make this video again", [run.command]) : "");
  };
  const show = (group) => {
    player?.pause();
    title.replaceChildren(make("h2", { id: "player-title", text: group.title }), factList(group.facts, "inline"));
    player = new Player(group, showMaps);
    stage.replaceChildren(player.root);
  };
  show(groups[0]);
  return [make("section", { class: "videos", "aria-labelledby": "player-title" }, chooser, title, stage, makeKeys()), mapped];
}

function makeKeys() {
  const keys = [["Space", "play, pause"], ["← →", "one frame"], ["Home End", "first, last frame"]];
  return make("p", { class: "keys" }, ...keys.flatMap(([key, text]) => [make("kbd", { text: key }), ` ${text}  `]));
}

function makeCommands(title, commands) {
  const blocks = commands.map((command) => {
    const copy = make("button", { type: "button", text: "Copy", onclick: () => copyText(command, copy) });
    return make("div", { class: "command" }, make("pre", { tabindex: 0, text: command }), copy);
  });
  return make("section", { class: "commands" }, make("h2", { text: title }), ...blocks);
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Without the permission, the text is marked for the user to copy.
    getSelection().selectAllChildren(button.previousSibling);
    button.textContent = "Marked";
  }
}

function makeFoot() {
  return make(
    "footer",
    {},
    make("section", {}, make("h2", { text: "Made with" }), factList(content.facts)),
    make("p", { class: "hint", text: `Report of dit-sparse ${content.version}, ${content.made}.` }),
  );
}

const groups = makeGroups();
const figures = [content.points.length ? makeChart(content.points) : null, ...content.tables.map(makeTable)];
const again = content.commands.length
  ? make("details", {}, make("summary", { text: "How to make all of it again" }), makeCommands("Commands", content.commands))
  : null;
// A comparison is about its figures, a run about its videos.
const body = content.kind === "compare" ? [...figures.slice(0, 2), ...groups, ...figures.slice(2)] : [...groups, ...figures];
page.append(...[makeHeader(), makeNotes(), ...body, again, makeFoot()].filter((node) => node !== null));
listenForTips();
document.addEventListener("keydown", (event) => {
  const busy = event.target.closest?.("select, input, button, summary, [role=gridcell], [role=radio], pre");
  if (busy || event.ctrlKey || event.metaKey || event.altKey) return;
  if (player?.key(event)) event.preventDefault();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => maps?.showMasks());
