const SVG = "http://www.w3.org/2000/svg";

/** An element. Properties are attributes, but for `text` and listeners such as `onclick`. */
function make(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for a drawing. */
function draw(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** The text of a part that the page carries. */
function part(id) {
  return document.getElementById(id).textContent;
}

/** A list of names and values. */
function factList(facts, className = "facts") {
  const entries = facts.map(([name, value]) =>
    make("div", {}, make("dt", { text: name }), make("dd", { text: value })),
  );
  return make("dl", { class: className }, ...entries);
}

/** A select whose label is read out; `choose` gets the index. */
function picker(label, names, chosen, choose) {
  const options = names.map((name, index) => make("option", { value: index, text: name, selected: index === chosen }));
  const select = make("select", { "aria-label": label, onchange: () => choose(Number(select.value)) }, ...options);
  return select;
}

/** A select with its label before it. */
function labelled(label, names, chosen, choose) {
  return make("label", { class: "labelled" }, label, picker(label, names, chosen, choose));
}

/** Shows `text` by `node` while the pointer or the focus is on it, and reads it out. */
function explain(node, text) {
  node.setAttribute("aria-label", text);
  node.dataset.tip = text;
}

function showTip(node) {
  const tip = document.getElementById("tooltip");
  tip.textContent = node.dataset.tip;
  tip.hidden = false;
  const at = node.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = at.top - own.height - 8;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above < 8 ? at.bottom + 8 : above) + scrollY}px`;
}

function listenForTips() {
  const hide = () => (document.getElementById("tooltip").hidden = true);
  for (const kind of ["pointerover", "focusin"]) {
    document.addEventListener(kind, (event) => {
      const node = event.target.closest?.("[data-tip]");
      if (node) showTip(node);
      else hide();
    });
  }
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

/** Lets arrow keys move among `rows` of nodes, of which one is in the tab order; `choose` gets what they come to. */
function rove(rows, choose) {
  const all = rows.flat();
  const move = (node) => {
    for (const other of all) other.tabIndex = other === node ? 0 : -1;
    node.focus();
    choose(node);
  };
  rows.forEach((row, r) =>
    row.forEach((node, c) => {
      node.tabIndex = r === 0 && c === 0 ? 0 : -1;
      node.addEventListener("click", () => move(node));
      node.addEventListener("keydown", (event) => {
        const columns = { ArrowLeft: c - 1, ArrowRight: c + 1, Home: 0, End: row.length - 1 };
        const lines = { ArrowUp: r - 1, ArrowDown: r + 1 };
        let target = null;
        if (event.key in columns) target = row[columns[event.key]];
        else if (event.key in lines) target = rows[lines[event.key]]?.[Math.min(c, rows[lines[event.key]].length - 1)];
        else return;
        event.preventDefault();
        event.stopPropagation();
        if (target) move(target);
      });
    }),
  );
}
