const [CHART_WIDTH, CHART_HEIGHT] = [760, 360];
const EDGE = { left: 52, right: 18, top: 14, bottom: 44 };

/** Round steps from below `low` to above `high`. */
function ticks(low, high, count = 6) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.floor(low / step) * step;
  const marks = [first];
  while (marks.at(-1) < high || marks.length < 2) marks.push(Number((marks.at(-1) + step).toPrecision(12)));
  return marks;
}

/** Speed-up against PSNR: a line a method, a point a density. */
function makeChart(points) {
  const [xs, ys] = ["x", "y"].map((axis) => {
    const values = points.map((point) => point[axis]);
    return ticks(Math.min(...values), Math.max(...values));
  });
  const place = (value, marks, from, to) => from + ((value - marks[0]) / (marks.at(-1) - marks[0])) * (to - from);
  const x = (value) => place(value, xs, EDGE.left, CHART_WIDTH - EDGE.right);
  const y = (value) => place(value, ys, CHART_HEIGHT - EDGE.bottom, EDGE.top);
  const groups = [...new Set(points.map((point) => point.group))];
  const lines = groups.map((group, number) => {
    const own = points.filter((point) => point.group === group).sort((a, b) => a.x - b.x);
    const path = own.map((point) => `${x(point.x)},${y(point.y)}`).join(" ");
    const dots = own.map((point) => {
      const dot = draw("circle", { cx: x(point.x), cy: y(point.y), r: 5.5, tabindex: 0, role: "img" });
      explain(dot, `${point.label} · ${point.x.toFixed(2)}× · ${point.y.toFixed(2)} dB`);
      return dot;
    });
    return draw("g", { class: `series s${number % 8}` }, draw("polyline", { points: path }), ...dots);
  });
  const grid = [
    ...xs.map((mark) => draw("g", {}, draw("line", { x1: x(mark), x2: x(mark), y1: EDGE.top, y2: CHART_HEIGHT - EDGE.bottom }),
      draw("text", { x: x(mark), y: CHART_HEIGHT - EDGE.bottom + 18, "text-anchor": "middle", text: `${mark}×` }))),
    ...ys.map((mark) => draw("g", {}, draw("line", { x1: EDGE.left, x2: CHART_WIDTH - EDGE.right, y1: y(mark), y2: y(mark) }),
      draw("text", { x: EDGE.left - 8, y: y(mark) + 4, "text-anchor": "end", text: mark }))),
  ];
  const names = [
    draw("text", { class: "axis-name", x: (EDGE.left + CHART_WIDTH) / 2, y: CHART_HEIGHT - 6, "text-anchor": "middle", text: "speed-up over dense" }),
    draw("text", { class: "axis-name", x: 12, y: CHART_HEIGHT / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${CHART_HEIGHT / 2 - 12})`, text: "PSNR against dense, dB" }),
  ];
  const key = groups.map((group, number) => make("li", {}, make("i", { class: `swatch s${number % 8}` }), group));
  return make(
    "section",
    { class: "chart", "aria-labelledby": "chart-title" },
    make("h2", { id: "chart-title", text: "Speed against fidelity" }),
    draw("svg", { viewBox: `0 0 ${CHART_WIDTH} ${CHART_HEIGHT}`, role: "group", "aria-label": "Speed-up against PSNR" }, draw("g", { class: "grid" }, ...grid), ...names, ...lines),
    make("ul", { class: "key" }, ...key),
  );
}
