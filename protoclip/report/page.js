// Galleries that fill as they are scrolled, and maps: dots on a canvas, coloured by class or cluster.
const parsed = script => JSON.parse(script.textContent);
const pictures = {};  // run -> its thumbnails
const thumbs = run => pictures[run] ??= parsed(document.getElementById("pictures of " + run));
const make = (tag, fields = {}) => Object.assign(document.createElement(tag), fields);
const image = (run, number, words) =>
  make("img", { src: "data:image/webp;base64," + thumbs(run)[number], alt: words, title: words });

function gallery(box) {
  const cards = parsed(box.querySelector("script")), list = box.querySelector(".protos");
  const end = make("div");
  let shown = 0;
  const card = one => {
    const head = make("p"), row = make("div", { className: "thumbs" }), words = make("ul");
    head.append(make("b", { textContent: "#" + one.cluster }), ` ${one.samples.toLocaleString()} sample${one.samples === 1 ? "" : "s"}`);
    for (const more of [one.class, one.words]) if (more) head.append(" · " + more);
    row.append(...(one.images ?? []).map(item => image(box.dataset.run, item.picture, item.caption)));
    words.append(...(one.captions ?? one.names ?? []).map(text => make("li", { textContent: text })));
    const whole = make("div", { className: "proto" });
    whole.append(head, row, words);
    if (one.members) {  // every name, written when it is asked for: there may be very many
      const all = make("details"), names = make("pre");
      const plural = one.members.length === 1 ? "" : "s";
      all.append(make("summary", { textContent: `all ${one.members.length.toLocaleString()} name${plural}` }), names);
      all.ontoggle = () => { if (all.open) names.textContent = one.members.join("\n"); };
      whole.append(all);
    }
    return whole;
  };
  const more = () => list.append(...cards.slice(shown, shown += 24).map(card));
  const watch = new IntersectionObserver(seen => {
    if (!seen.some(one => one.isIntersecting)) return;
    more();
    watch.unobserve(end);
    if (shown < cards.length) watch.observe(end);  // again, as it may still be in view
  }, { rootMargin: "600px" });
  if (box.open) more();
  list.after(end);
  watch.observe(end);
}
document.querySelectorAll(".gallery").forEach(gallery);

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const dark = matchMedia("(prefers-color-scheme: dark)");

function hue(id, total) {
  if (id < 0) return dark.matches ? "#4a525c" : "#c5ccd4";
  // A few classes get even steps around the circle, many prototypes the golden angle.
  const angle = total <= 24 ? (360 * id) / total : (id * 137.508) % 360;
  return `hsl(${angle.toFixed(1)} 68% ${(dark.matches ? 66 : 46) + (id % 2) * 12 - 6}%)`;
}

function map(box) {
  const data = parsed(box.querySelector("script"));
  const xy = new Uint16Array(bytes(data.xy)), n = data.n, dots = xy.length / 2;
  const canvas = box.querySelector("canvas"), pen = canvas.getContext("2d");
  const tools = box.querySelector(".tools"), hint = box.querySelector("[data-hint]");
  const key = make("div", { className: "legend" });
  canvas.after(key);
  const state = { by: Object.keys(data.by)[0], only: -1, shown: [true, true] };
  const ids = {}, faces = {};  // pictures replace dots if there are few, or of a single cluster
  for (const name in data.by) ids[name] = new Int32Array(bytes(data.by[name].ids));
  const at = i => [20 + (xy[2 * i] / 65535) * (canvas.width - 40),  // a margin of half a picture
                   20 + (xy[2 * i + 1] / 65535) * (canvas.height - 40)];

  function draw() {
    const own = ids[state.by], names = state.by ? data.by[state.by].names : [];
    const total = names.length || (own ? own.reduce((a, b) => Math.max(a, b), 0) + 1 : 1);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const size = n > 20000 ? 1.6 : n > 4000 ? 2.4 : 3.4;
    for (const faint of [true, false]) {
      for (let i = 0; i < dots; i++) {
        const text = i >= n;
        if (!state.shown[+text]) continue;
        const id = own ? own[i % n] : 0;
        const pale = state.only >= 0 && id !== state.only;
        if (pale !== faint) continue;
        const [x, y] = at(i);
        pen.globalAlpha = pale ? 0.08 : n > 20000 ? 0.5 : 0.8;
        pen.fillStyle = hue(id, total);
        pen.beginPath();
        if (text) pen.rect(x - size * 0.8, y - size * 0.8, size * 1.6, size * 1.6);
        else pen.arc(x, y, size, 0, 7);
        pen.fill();
        if (text || faint || !(data.pictures[i] >= 0) || (state.only < 0 && n > 400)) continue;
        const face = faces[i] ??= Object.assign(image(box.dataset.run, data.pictures[i], ""), { onload: draw });
        if (face.complete) pen.drawImage(face, x - face.width / 4, y - face.height / 4, face.width / 2, face.height / 2);
      }
    }
    key.replaceChildren(...names.slice(0, 40).map((name, id) => {
      const item = make("button"), mark = make("i");
      mark.style.background = hue(id, total);
      item.append(mark, name);
      item.setAttribute("aria-pressed", state.only < 0 || state.only === id);
      item.onclick = () => { state.only = state.only === id ? -1 : id; draw(); };
      return item;
    }));
    hint.textContent = names.length
      ? "Click a name to see only that class. Point at a dot to see its sample."
      : `${total.toLocaleString()} clusters, each in its own colour; click a dot to see only its cluster.`;
  }

  const choice = make("select");
  choice.setAttribute("aria-label", "colour by");
  for (const name in data.by) choice.add(new Option("colour by " + name, name));
  choice.onchange = () => { state.by = choice.value; state.only = -1; draw(); };
  if (choice.length) tools.append(choice);
  (dots > n ? ["images ●", "captions ■"] : []).forEach((word, i) => {
    const item = make("button", { textContent: word });
    item.setAttribute("aria-pressed", "true");
    item.onclick = () => {
      state.shown[i] = !state.shown[i];
      item.setAttribute("aria-pressed", state.shown[i]);
      draw();
    };
    tools.append(item);
  });

  function nearest(event) {
    const r = canvas.getBoundingClientRect(), s = canvas.width / r.width;
    const x = (event.clientX - r.left) * s, y = (event.clientY - r.top) * s;
    let best = -1, least = 200;
    for (let i = 0; i < dots; i++) {
      if (!state.shown[+(i >= n)]) continue;
      const [a, b] = at(i), d = (a - x) ** 2 + (b - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }
  canvas.onpointermove = event => {
    const i = nearest(event);
    if (i < 0) return;
    const words = data.words[i % n], seen = data.pictures[i % n] >= 0;
    hint.replaceChildren((i >= n ? "caption: " : seen ? "image of: " : "") + words);
    if (seen) hint.prepend(image(box.dataset.run, data.pictures[i % n], words));
  };
  canvas.onclick = event => {
    const i = nearest(event), own = ids[state.by];
    state.only = i < 0 || !own || own[i % n] === state.only ? -1 : own[i % n];
    draw();
  };
  dark.addEventListener("change", draw);
  draw();
}
document.querySelectorAll(".map").forEach(map);
