const SPEEDS = [0.1, 0.25, 0.5, 1, 2, 4];
const GAINS = [1, 2, 4, 8, 16, 32];

/** Two videos of one group that play in step, and their difference. */
class Player {
  /**
   * @param group the runs to choose from.
   * @param onChoice gets the run on the right whenever it is chosen.
   */
  constructor(group, onChoice) {
    this.runs = group.runs;
    this.onChoice = onChoice;
    this.playing = false;
    this.turn = 0;
    this.speed = 1;
    this.gain = 8;
    const shown = this.runs.map((run, index) => index).filter((index) => this.runs[index].media);
    this.chosen = shown.length > 1 ? [shown[0], shown[1]] : [shown[0] ?? 0];
    const media = this.runs[this.chosen[0]].media;
    this.frames = media ? media.frames : 1;
    this.fps = media ? media.fps : 1;
    this.still = !media || media.image;
    this.sides = this.chosen.map((index, side) => this.makeSide(index, side));
    this.canvas = make("canvas", { role: "img", "aria-label": "Difference of the two videos" });
    this.transport = this.still ? null : this.makeTransport();
    const difference = this.chosen.length > 1 ? this.makeDifference() : null;
    this.root = make(
      "div",
      { class: "player" },
      make("div", { class: "stage", "data-panes": this.chosen.length + (difference ? 1 : 0) }, ...this.sides.map((s) => s.root), difference),
      this.transport,
    );
    this.sides.forEach((side, number) => this.load(number, side.index));
  }

  makeSide(index, side) {
    const select = picker(
      ["Video on the left", "Video on the right"][side],
      this.runs.map((run) => run.label),
      index,
      (chosen) => this.load(side, chosen),
    );
    const screen = make("div", { class: "screen" });
    const facts = make("div", { class: "under" });
    const root = make("figure", { class: "pane" }, make("figcaption", {}, select), screen, facts);
    return { root, screen, facts, index, view: null };
  }

  makeDifference() {
    const gain = picker("Amplification of the difference", GAINS.map((g) => `× ${g}`), GAINS.indexOf(this.gain), (i) => {
      this.gain = GAINS[i];
      this.showDifference();
    });
    const caption = make("figcaption", {}, make("span", { class: "name", text: "difference" }), gain);
    const note = make("div", { class: "under" }, make("p", { text: "|left − right| of each colour, of the files as shown." }));
    return make("figure", { class: "pane" }, caption, make("div", { class: "screen" }, this.canvas), note);
  }

  makeTransport() {
    const button = (label, text, act, className) =>
      make("button", { type: "button", class: className, "aria-label": label, title: label, text, onclick: act });
    this.playButton = button("Play (space)", "▶", () => this.toggle(), "play");
    this.scrub = make("input", {
      type: "range", min: 0, max: this.frames - 1, step: 1, value: 0, "aria-label": "Frame",
      oninput: () => this.pauseAt(Number(this.scrub.value)),
    });
    this.readout = make("output", { class: "readout" });
    const speed = picker("Speed", SPEEDS.map((s) => `${s}×`), SPEEDS.indexOf(1), (i) => {
      this.speed = SPEEDS[i];
      for (const video of this.videos()) video.playbackRate = this.speed;
    });
    return make(
      "div",
      { class: "transport", role: "group", "aria-label": "Playback" },
      button("One frame back (left arrow)", "‹", () => this.pauseAt(this.frame() - 1)),
      this.playButton,
      button("One frame on (right arrow)", "›", () => this.pauseAt(this.frame() + 1)),
      this.scrub,
      this.readout,
      speed,
    );
  }

  videos() {
    return this.sides.map((side) => side.view).filter((view) => view instanceof HTMLVideoElement);
  }

  load(number, index) {
    const side = this.sides[number];
    const run = this.runs[index];
    const frame = this.still || !side.view ? 0 : this.frame();
    if (!this.still) this.halt();
    side.index = index;
    side.view = run.media ? this.view(run) : make("p", { class: "missing", text: "this video is missing" });
    side.screen.replaceChildren(side.view);
    side.facts.replaceChildren(factList(run.facts));
    if (run.media?.encoded) side.facts.append(make("p", { text: "encoded anew for this page" }));
    if (!this.still) this.pauseAt(frame);
    if (number === this.sides.length - 1) this.onChoice(run);
    this.showDifference();
  }

  view(run) {
    const { media, label } = run;
    const source = media.part ? part(media.part) : media.link;
    const size = { width: media.width, height: media.height };
    if (media.image) return make("img", { src: source, alt: label, ...size, onload: () => this.showDifference() });
    const broken = () => video.replaceWith(make("p", { class: "missing", text: "this browser cannot play the video" }));
    const video = make("video", { src: source, preload: "auto", playsinline: true, "aria-label": label, ...size, onerror: broken });
    video.muted = true;
    video.addEventListener("seeked", () => this.showDifference());
    video.addEventListener("loadeddata", () => this.showDifference());
    return video;
  }

  frame() {
    const [first] = this.videos();
    return first ? Math.min(this.frames - 1, Math.floor(first.currentTime * this.fps + 1e-3)) : 0;
  }

  pauseAt(frame) {
    this.halt();
    const at = Math.min(this.frames - 1, Math.max(0, frame));
    // The middle of the frame, so that rounding cannot lead to its neighbour.
    for (const video of this.videos()) video.currentTime = (at + 0.5) / this.fps;
    this.showFrame(at);
  }

  /** On one frame, which both videos then show. */
  pause() {
    if (this.playing) this.pauseAt(this.frame());
  }

  showFrame(frame) {
    if (!this.scrub) return;
    this.scrub.value = frame;
    this.scrub.setAttribute("aria-valuetext", `frame ${frame + 1} of ${this.frames}`);
    this.readout.textContent = `${frame + 1} / ${this.frames}`;
  }

  toggle() {
    return this.playing ? this.pause() : this.play();
  }

  async play() {
    if (this.still || this.playing) return;
    this.playing = true;
    this.playButton.textContent = "❚❚";
    this.playButton.setAttribute("aria-label", "Pause (space)");
    const turn = ++this.turn;
    if (this.frame() >= this.frames - 1) await this.rewind();
    if (this.playing) await this.start();
    this.tick(turn);
  }

  halt() {
    if (!this.playing) return;
    this.playing = false;
    this.playButton.textContent = "▶";
    this.playButton.setAttribute("aria-label", "Play (space)");
    for (const video of this.videos()) video.pause();
  }

  start() {
    return Promise.all(this.videos().map((video) => {
      video.playbackRate = this.speed;
      return video.play().catch(() => {}); // paused again before it began
    }));
  }

  rewind() {
    return Promise.all(this.videos().map((video) => new Promise((done) => {
      video.addEventListener("seeked", done, { once: true });
      video.currentTime = 0;
    })));
  }

  /** On every picture of the screen, until the videos are paused or played anew. */
  async tick(turn) {
    if (!this.playing || turn !== this.turn) return;
    const [first, ...others] = this.videos();
    if (first.ended || others.some((video) => video.ended)) {
      await this.rewind();
      if (this.playing) await this.start();
    }
    if (this.playing) {
      for (const video of others) this.follow(first, video);
      this.showFrame(this.frame());
      this.showDifference();
    }
    requestAnimationFrame(() => this.tick(turn));
  }

  /** Small leads and lags are played away; a seek would stall the picture. */
  follow(first, video) {
    const lead = video.currentTime - first.currentTime;
    if (Math.abs(lead) > 2 / this.fps && !video.seeking) video.currentTime = first.currentTime;
    const correction = Math.max(-0.5, Math.min(0.5, lead * 6));
    const rate = this.speed * (1 - correction);
    if (Math.abs(video.playbackRate - rate) > 0.01 * this.speed) video.playbackRate = rate;
  }

  showDifference() {
    if (this.sides?.length !== 2) return;
    const [a, b] = this.sides.map((side) => side.view);
    const width = a.videoWidth || a.naturalWidth;
    if (!width || !(b.videoWidth || b.naturalWidth)) return;
    if (this.canvas.width !== width) {
      this.canvas.width = width;
      this.canvas.height = a.videoHeight || a.naturalHeight;
    }
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = "copy";
    context.drawImage(a, 0, 0);
    context.globalCompositeOperation = "difference";
    context.drawImage(b, 0, 0);
    this.canvas.style.filter = `brightness(${this.gain})`;
  }

  /** A key pressed anywhere on the page that nothing else wants. */
  key(event) {
    if (this.still) return false;
    const frame = this.frame();
    const actions = {
      " ": () => this.toggle(),
      ArrowLeft: () => this.pauseAt(frame - 1),
      ArrowRight: () => this.pauseAt(frame + 1),
      Home: () => this.pauseAt(0),
      End: () => this.pauseAt(this.frames - 1),
    };
    if (!(event.key in actions)) return false;
    actions[event.key]();
    return true;
  }
}
