const KINDS = [
  ["dense", "dense"],
  ["search", "search, dense"],
  ["plan", "new plan"],
  ["reuse", "cached plan"],
  ["none", "did not run"],
];

/** The colour of an action: everything that is no plan and no search is dense. */
function kindOf(action) {
  if (action === undefined) return "none";
  return ["plan", "reuse", "search"].includes(action) ? action : "dense";
}

function words(action) {
  if (action === undefined) return "did not run";
  if (action === "plan") return "new plan";
  if (action === "reuse") return "cached plan";
  return `dense: ${action}`;
}

/** What a run did: its steps, the density of each layer and head, and the masks. */
class Maps {
  constructor(trace, label) {
    this.trace = trace;
    this.track = trace.tracks[0];
    this.step = this.firstSparseStep();
    this.layer = Math.max(0, this.densities().findIndex((heads) => heads !== null));
    this.head = 0;
    this.pictures = new Map();
    this.timeline = make("div", { class: "timeline" });
    this.heat = make("div", { class: "heat-box" });
    this.masks = make("div", { class: "masks-box" });
    this.root = make(
      "section",
      { class: "maps", "aria-labelledby": "maps-title" },
      make("div", { class: "section-head" }, make("h2", { id: "maps-title", text: `What ${label} did` }), this.makeTrackPicker()),
      this.timeline,
      make("div", { class: "split" }, this.heat, this.masks),
    );
    this.show();
  }

  makeTrackPicker() {
    const several = new Set(this.trace.tracks.map((track) => track.model)).size > 1;
    const names = this.trace.tracks.map((track) => (several ? `${track.model}, ${track.branch}` : track.branch));
    if (names.length < 2) return null;
    return labelled("Guidance branch", names, 0, (index) => {
      this.track = this.trace.tracks[index];
      this.show();
    });
  }

  firstSparseStep() {
    const place = this.track.layers.findIndex((row) => row.some((n) => ["plan", "reuse"].includes(this.track.actions[n])));
    return this.track.steps[Math.max(0, place)];
  }

  show() {
    this.showTimeline();
    this.showHeat();
    this.showMasks();
  }

  showTimeline() {
    const longest = Math.max(...this.trace.steps.map((s) => s.seconds ?? s.attention_seconds + s.plan_seconds));
    const columns = this.trace.steps.map((step) => this.makeStep(step, longest));
    const total = this.trace.steps.reduce((sum, step) => sum + (step.seconds ?? 0), 0);
    const key = [["rest", "rest of the step"], ["attention", "attention"], ["planning", "planning"], ...KINDS];
    const inUse = new Set(["rest", "attention", "planning", ...this.track.layers.flat().map((n) => kindOf(this.track.actions[n]))]);
    this.timeline.replaceChildren(
      make("h3", { text: "Steps" }),
      make("p", { class: "hint", text: `Seconds of each step (the longest ${longest.toFixed(2)} s, all ${total.toFixed(1)} s), and below what each layer did in it.` }),
      make("div", { class: "steps", role: "radiogroup", "aria-label": "Denoising step" }, ...columns),
      make("ul", { class: "key" }, ...key.filter(([name]) => inUse.has(name)).map(([name, text]) =>
        make("li", {}, make("i", { class: `swatch ${name}` }), text))),
    );
    rove([columns], (node) => {
      this.step = Number(node.dataset.step);
      this.markStep(columns);
      this.showHeat();
      this.showMasks();
    });
    this.markStep(columns);
  }

  makeStep(step, longest) {
    const seconds = step.seconds ?? step.attention_seconds + step.plan_seconds;
    const rest = Math.max(0, seconds - step.attention_seconds - step.plan_seconds);
    const bars = [["rest", rest], ["planning", step.plan_seconds], ["attention", step.attention_seconds]].map(([name, value]) => {
      const bar = make("i", { class: name });
      bar.style.height = `${(100 * value) / longest}%`;
      return bar;
    });
    const row = this.track.layers[this.track.steps.indexOf(step.step)] ?? [];
    const actions = row.map((number) => this.track.actions[number]);
    const cells = actions.map((action) => make("i", { class: kindOf(action) }));
    const column = make(
      "div",
      { class: "step", role: "radio", "data-step": step.step },
      make("div", { class: "bars" }, ...bars),
      make("div", { class: "actions" }, ...cells),
      make("span", { class: "number", text: step.step + 1 }),
    );
    const did = [...new Set(actions.map(words))].join(", ") || "did not run";
    const times = `${seconds.toFixed(2)} s: attention ${step.attention_seconds.toFixed(2)}, planning ${step.plan_seconds.toFixed(2)}`;
    explain(column, `step ${step.step + 1} · ${did} · density ${step.density.toFixed(3)} · ${times}`);
    return column;
  }

  markStep(columns) {
    for (const column of columns) {
      const chosen = Number(column.dataset.step) === this.step;
      column.setAttribute("aria-checked", chosen);
      column.tabIndex = chosen ? 0 : -1;
    }
  }

  /** Density of each layer's heads at the chosen step; `null` where a layer was dense. */
  densities() {
    const before = this.track.density.filter((entry) => entry.step <= this.step);
    return (before.at(-1) ?? this.track.density[0]).heads;
  }

  actionOf(layer) {
    return this.track.actions[this.track.layers[this.track.steps.indexOf(this.step)]?.[layer]];
  }

  showHeat() {
    const layers = this.densities();
    const every = this.track.density.flatMap((entry) => entry.heads.flatMap((heads) => heads ?? []));
    const top = Math.max(0.01, ...every);
    const heads = Math.max(1, ...this.track.density.flatMap((entry) => entry.heads.map((own) => own?.length ?? 1)));
    const rows = layers.map((own, layer) => this.makeHeatRow(own, layer, heads, top));
    const grid = make(
      "div",
      { class: "heat", role: "grid", "aria-label": "Density by layer and head" },
      ...rows.map((cells, layer) =>
        make("div", { role: "row" }, make("span", { class: "axis", role: "rowheader", text: layer }), ...cells)),
    );
    grid.style.setProperty("--heads", heads);
    grid.style.setProperty("--layers", layers.length);
    this.heat.replaceChildren(
      make("h3", { text: `Density at step ${this.step + 1}` }),
      make("p", { class: "hint", text: "Layers down, heads across; hatched where the layer ran dense." }),
      grid,
      make("div", { class: "scale" }, make("span", { text: "0" }), make("i"), make("span", { text: top.toFixed(2) })),
    );
    rove(rows, (cell) => {
      this.layer = Number(cell.dataset.layer);
      this.head = Number(cell.dataset.head);
      this.markCell(rows);
      this.showMasks();
    });
    this.markCell(rows);
  }

  makeHeatRow(own, layer, heads, top) {
    const values = own ?? [null];
    return values.map((value, head) => {
      const cell = make("div", { class: value === null ? "cell dense" : "cell", role: "gridcell", "data-layer": layer, "data-head": head });
      if (value !== null) cell.style.setProperty("--share", value / top);
      if (values.length === 1) cell.style.gridColumn = `span ${heads}`;
      const which = values.length === 1 && heads > 1 ? "all heads" : `head ${head}`;
      const density = value === null ? "density 1" : `density ${value.toFixed(4)}`;
      explain(cell, `layer ${layer} · ${which} · ${density} · ${words(this.actionOf(layer))}`);
      return cell;
    });
  }

  markCell(rows) {
    const layer = rows[Math.min(this.layer, rows.length - 1)];
    const chosen = layer[Math.min(this.head, layer.length - 1)];
    for (const cell of rows.flat()) {
      cell.setAttribute("aria-selected", cell === chosen);
      cell.tabIndex = cell === chosen ? 0 : -1;
    }
  }

  /** The masks in force at the chosen step in the chosen layer. */
  findMask() {
    const own = this.trace.masks.filter(
      (mask) => (mask.layer === null || mask.layer === this.layer) && (mask.model === null || mask.model === this.track.model),
    );
    const before = own.filter((mask) => mask.step <= this.step);
    return before.at(-1) ?? null;
  }

  async showMasks() {
    const mask = this.actionOf(this.layer) && ["plan", "reuse"].includes(this.actionOf(this.layer)) ? this.findMask() : null;
    const title = make("h3", { text: `Masks of layer ${this.layer}` });
    if (!mask) {
      this.masks.replaceChildren(title, make("p", { class: "hint", text: "No mask: the layer ran dense at this step, or none was kept." }));
      return;
    }
    const levels = await this.readPicture(mask);
    const [rows, columns] = mask.size;
    const heads = levels.length / rows / columns;
    const one = Math.min(this.head, heads - 1);
    const branch = mask.branch && mask.branch !== this.track.branch ? `, of the ${mask.branch} branch` : "";
    const size = `${mask.blocks[0]} × ${mask.blocks[1]} blocks (query down, key across)`;
    const thumbs = Array.from({ length: heads }, (_, head) => this.makeThumb(levels, mask, head, head === one));
    this.masks.replaceChildren(
      title,
      make("p", { class: "hint", text: `${size}, planned at step ${mask.step + 1}${branch}; the stronger, the more blocks are kept.` }),
      make("figure", { class: "mask" }, this.picture(levels, mask, one), make("figcaption", { text: heads > 1 ? `head ${one}` : "all heads" })),
      heads > 1 ? make("div", { class: "thumbs" }, ...thumbs) : "",
    );
  }

  makeThumb(levels, mask, head, chosen) {
    const choose = () => {
      this.head = head;
      this.showHeat();
      this.showMasks();
    };
    const button = make("button", { type: "button", class: "thumb", "aria-pressed": chosen, onclick: choose }, this.picture(levels, mask, head));
    explain(button, `mask of layer ${this.layer} · head ${head}`);
    return button;
  }

  picture(levels, mask, head) {
    const [rows, columns] = mask.size;
    const canvas = make("canvas", { width: columns, height: rows, role: "img", "aria-label": `Mask of head ${head}` });
    const style = getComputedStyle(document.documentElement);
    const [low, high] = ["--mask-low", "--mask-high"].map((name) => style.getPropertyValue(name).trim().split(" ").map(Number));
    const image = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const share = levels[head * rows * columns + i] / 255;
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = low[c] + (high[c] - low[c]) * share;
      image.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  /** Gray levels of the heads of `mask`, one after another. */
  async readPicture(mask) {
    if (!this.pictures.has(mask)) {
      const image = new Image();
      image.src = `data:image/png;base64,${mask.png}`;
      await image.decode();
      const canvas = make("canvas", { width: image.width, height: image.height });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, image.width, image.height).data;
      this.pictures.set(mask, pixels.filter((_, index) => index % 4 === 0));
    }
    return this.pictures.get(mask);
  }
}
