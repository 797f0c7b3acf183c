// The listening panel. It takes over the HTML that lib/listening/player.py writes (`.players`, plain audio elements that
// also work without scripts): one transport for all clips, so that switching keeps the position; true levels or equal
// loudness; a cursor in every picture; a blind ABX test. An anywidget in notebooks, inlined in the page.

const FREQUENCIES = [300, 1000, 3000, 10000]; // Hz, beside every mel spectrogram
const FADE = 0.008; // seconds of crossfade when clips are switched, so that nothing clicks
const shared = (globalThis.latentFusionSound ??= { context: null, audible: null }); // one panel plays at a time

function element(tag, properties = {}, children = []) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
}

/** A labelled group of radio buttons; `choose(i)` is called with the number of the selected one. */
function choice(legend, values, chosen, choose) {
  const name = `choice-${Math.random().toString(36).slice(2)}`;
  const inputs = values.map((label, value) => {
    const input = element("input", { type: "radio", name, checked: value === chosen, onchange: () => choose(value) });
    return element("label", {}, [input, ` ${label}`]);
  });
  return element("fieldset", { className: "choice" }, [element("legend", { textContent: legend }), ...inputs]);
}

class Panel {
  /** `state`: of the panel that this one replaces. */
  constructor(root, { position = 0, name = "", equal = false, loop = false, message = "" } = {}) {
    this.clips = [...root.querySelectorAll(".player")].map((figure) => ({
      figure,
      name: figure.dataset.name,
      audio: figure.querySelector("audio"),
      gain: Number(figure.dataset.gain), // linear; makes it as loud as the others
    }));
    const duration = Number(root.dataset.seconds);
    // sources: one for each clip while playing, all in sync: switching only changes gains
    Object.assign(this, { root, duration, equal, loop, blind: false, sources: [] });
    this.position = Math.min(position, duration);
    this.current = Math.max(0, this.clips.findIndex((clip) => clip.name === name));
    this.build();
    this.problem.textContent = message;
    this.show();
  }

  /** What a panel that replaces this one keeps. */
  get state() {
    const { name } = this.clips[this.blind ? this.before : this.current]; // X stays secret
    const ended = "The clips changed, which ended the blind test. ";
    const message = this.blind ? ended + this.score.textContent : this.problem.textContent;
    return { position: this.now(), name, equal: this.equal, loop: this.loop, message };
  }

  // --- display ---

  build() {
    this.button = element("button", { type: "button", className: "play" });
    this.button.onclick = () => (this.playing ? this.pause() : this.play());
    this.slider = element("input", { type: "range", min: 0, max: this.duration, step: 0.05, className: "position" });
    this.slider.ariaLabel = "Position in the clip, seconds";
    this.slider.oninput = () => this.seek(Number(this.slider.value));
    this.time = element("output", { className: "time" });
    const loop = element("input", { type: "checkbox", checked: this.loop, onchange: () => (this.loop = loop.checked) });
    const repeat = element("label", {}, [loop, " loop"]);
    const transport = element("div", { className: "transport" }, [this.button, this.slider, this.time, repeat]);
    this.names = choice("Clip", this.clips.map((clip) => clip.name), this.current, (current) => this.mix({ current }));
    this.levels = choice("Level", ["true", "equal loudness"], Number(this.equal), (i) => this.mix({ equal: i === 1 }));
    this.problem = element("p", { className: "problem", role: "alert" });
    const controls = [transport, this.names, this.levels, this.problem];
    if (this.clips.length > 1) controls.push(this.buildTest());
    const onkeydown = (event) => event.stopPropagation(); // or JupyterLab takes the arrow keys
    this.root.prepend(element("div", { className: "panel", onkeydown }, controls));
    const highest = Number(this.root.dataset.rate) / 2;
    for (const clip of this.clips) {
      clip.audio.hidden = true;
      clip.cursor = element("div", { className: "cursor" });
      clip.shift = element("small", { className: "shift" });
      clip.figure.querySelector("figcaption").append(clip.shift);
      const picture = clip.figure.querySelector(".picture");
      picture.append(clip.cursor);
      FREQUENCIES.filter((hertz) => hertz < highest).forEach((hertz, i) => {
        // on the mel scale of the lower 80 of a picture's 140 rows
        const label = element("span", { className: "frequency", textContent: `${hertz / 1000} kHz` });
        label.classList.toggle("between", i % 2 === 0); // left out of small pictures
        label.style.bottom = `${((8000 / 140) * Math.log(1 + hertz / 700)) / Math.log(1 + highest / 700)}%`;
        picture.append(label);
      });
      picture.onclick = (event) => {
        const box = picture.getBoundingClientRect();
        this.seek(((event.clientX - box.left) / box.width) * this.duration);
      };
    }
  }

  show() {
    const at = this.now();
    this.slider.value = at;
    this.slider.ariaValueText = `${at.toFixed(1)} of ${this.duration.toFixed(1)} seconds`;
    this.time.textContent = `${clock(at)} / ${clock(this.duration)}`;
    const matched = this.equal || this.blind;
    this.root.querySelector(".note").hidden = matched;
    this.levels.querySelectorAll("input")[Number(matched)].checked = true;
    this.names.disabled = this.levels.disabled = this.blind;
    this.button.textContent = this.playing ? "❚❚ Pause" : "▶ Play";
    this.clips.forEach((clip, i) => {
      clip.cursor.style.left = `${(100 * at) / this.duration}%`;
      const decibels = 20 * Math.log10(clip.gain);
      clip.shift.textContent = matched ? `played ${decibels < 0 ? "−" : "+"}${Math.abs(decibels).toFixed(1)} dB` : "";
      clip.figure.classList.toggle("current", i === this.current && !this.blind);
    });
  }

  follow() {
    if (!this.playing) return;
    if (this.now() >= this.duration) {
      this.pause(0);
      return this.loop ? this.play() : undefined;
    }
    this.show();
    requestAnimationFrame(() => this.follow());
  }

  // --- sound ---

  get playing() {
    return this.sources.length > 0;
  }

  get context() {
    return (shared.context ??= new AudioContext());
  }

  now() {
    return this.playing ? Math.min(this.duration, this.position + this.context.currentTime - this.began) : this.position;
  }

  async load() {
    await this.context.resume();
    await Promise.all(this.clips.map(async (clip) => {
      if (clip.buffer) return;
      const sound = atob(clip.audio.src.slice(clip.audio.src.indexOf(",") + 1)); // of a data URI
      clip.buffer = await this.context.decodeAudioData(Uint8Array.from(sound, (c) => c.charCodeAt(0)).buffer);
    }));
  }

  async play() {
    this.wanted = true; // until paused, perhaps before the clips are loaded
    if (shared.audible && shared.audible !== this) shared.audible.pause();
    shared.audible = this;
    try {
      await this.load();
    } catch (error) {
      this.problem.textContent = `This browser cannot play the clips: ${error.message}`;
      return;
    }
    if (this.playing || !this.wanted || shared.audible !== this) return; // started, paused or stopped by another panel
    if (this.position >= this.duration) this.position = 0;
    this.began = this.context.currentTime;
    this.sources = this.clips.map((clip, i) => {
      const source = new AudioBufferSourceNode(this.context, { buffer: clip.buffer });
      clip.level = new GainNode(this.context, { gain: this.levelOf(i) });
      source.connect(clip.level).connect(this.context.destination);
      source.start(0, this.position);
      return source;
    });
    this.follow();
  }

  pause(position = this.now()) {
    for (const source of this.sources) source.stop();
    Object.assign(this, { position, wanted: false, sources: [] });
    this.show();
  }

  seek(position) {
    const resume = this.wanted && position < this.duration;
    this.pause(Math.max(0, Math.min(position, this.duration)));
    if (resume) this.play();
  }

  levelOf(i) {
    if (i !== this.current) return 0;
    return this.equal || this.blind ? this.clips[i].gain : 1;
  }

  /** Play what `changes` says: another clip or level, or the blind test. */
  mix(changes) {
    Object.assign(this, changes);
    this.clips.forEach((clip, i) => {
      clip.level?.gain.setTargetAtTime(this.levelOf(i), this.context.currentTime, FADE / 3);
    });
    this.show();
  }

  // --- blind test ---

  /** Probability of at least `right` of `trials` by guessing: the upper tail of a binomial with p = 1/2. */
  static guessing(right, trials) {
    let term = 1, tail = 0, all = 0;
    for (let i = 0; i <= trials; i++) {
      all += term;
      if (i >= right) tail += term;
      term = (term * (trials - i)) / (i + 1);
    }
    return tail / all;
  }

  buildTest() {
    const outputs = this.clips.flatMap(({ name }, i) => (["input", "target", "plain average", "HPSS"].includes(name) ? [] : [i]));
    const chosen = outputs.length > 1 ? outputs : [0, outputs[0] || 1]; // two outputs, else input against output
    this.picks = chosen.slice(0, 2).map((value) => {
      const options = this.clips.map((clip, i) => element("option", { value: i, textContent: clip.name }));
      const select = element("select", { onchange: () => this.newTest() }, options);
      return Object.assign(select, { value });
    });
    this.listen = choice("Listen to", ["A", "B", "X"], -1, (i) => this.listenTo(i));
    this.guesses = ["X is A", "X is B"].map((textContent, i) =>
      element("button", { type: "button", textContent, onclick: () => this.answer(i) }));
    this.score = element("p", { className: "score", ariaLive: "polite" });
    const ontoggle = () => (test.open ? this.beginTest() : this.mix({ blind: false, current: this.before }));
    const test = element("details", { className: "abx", ontoggle }, [
      element("summary", { textContent: "Blind test (ABX)" }),
      element("p", { textContent: "X is A or B, chosen at random every round; all play equally loud. Can you hear which? " +
        "Listen to X before you answer. While A, B or X plays, clip and level are not yours to choose." }),
      element("div", {}, this.picks.map((pick, i) => element("label", {}, [`${"AB"[i]} is `, pick, " "]))),
      this.listen,
      element("div", {}, this.guesses),
      this.score,
    ]);
    return test;
  }

  beginTest() {
    this.before = this.current;
    this.problem.textContent = "";
    if (this.trials) this.draw(); // the score continues
    else this.newTest();
  }

  newTest() {
    this.right = this.trials = 0;
    const [a, b] = this.picks.map((pick) => pick.value);
    this.listen.disabled = a === b;
    this.score.textContent = a === b ? "A and B are the same clip; choose another for one of them." : "";
    this.draw();
  }

  draw() {
    this.x = crypto.getRandomValues(new Uint8Array(1))[0] & 1;
    for (const input of this.listen.querySelectorAll("input")) input.checked = false;
    for (const button of this.guesses) button.disabled = true; // until X has played
  }

  listenTo(i) {
    if (i === 2) for (const button of this.guesses) button.disabled = false;
    this.mix({ blind: true, current: Number(this.picks[i === 2 ? this.x : i].value) });
    if (!this.playing) this.play();
  }

  answer(i) {
    const right = i === this.x;
    this.trials += 1;
    this.right += Number(right);
    const chance = Panel.guessing(this.right, this.trials);
    this.score.textContent = `${right ? "Right" : "Wrong"}, X was ${"AB"[this.x]}. ${this.right} of ${this.trials} right, ` +
      `p = ${chance.toFixed(chance < 0.1 ? 3 : 2)} (the probability of that many by guessing). X was chosen again.`;
    this.listen.querySelectorAll("input")[2].focus();
    this.draw();
  }
}

export function mount(root, state) {
  return (root.panel = new Panel(root, state));
}

export default {
  render({ model, el }) {
    let panel;
    const draw = () => {
      const { state, playing: resume } = panel ?? {};
      panel?.pause();
      el.innerHTML = model.get("html");
      const root = el.querySelector(".players"); // none yet where there is nothing to play
      panel = root ? mount(root, state) : undefined;
      if (resume) panel?.play();
    };
    model.on("change:html", draw);
    draw();
    return () => panel?.pause();
  },
};
