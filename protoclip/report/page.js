// Galleries that show more when asked, and maps: dots on a canvas, coloured by class or cluster.
const parsed = script => JSON.parse(script.textContent);
const pictures = {};  // run -> its thumbnails
const thumbs = run => pictures[run] ??= parsed(document.getElementById("pictures of " + run));
const make = (tag, fields = {}) => Object.assign(document.createElement(tag), fields);
const image = (run, number, words) =>
  make("img", { src: "data:image/webp;base64," + thumbs(run)[number], alt: words, title: words });

const count = (n, noun) => `${n.toLocaleString()} ${noun}${n === 1 ? "" : "s"}`;

const STEP = 24;  // cards of a gallery at once
const FEW = 8;  // pictures of a card: two full rows

function gallery(box) {
  const cards = parsed(box.querySelector("script")), list = box.querySelector(".protos");
  const end = make("div", { className: "tools" });
  let shown = 0;
  const card = one => {
    const number = "#" + one.cluster, name = one.words || one.like || number, items = one.images ?? [], alike = one.duplicates ?? {};
    const head = make("p"), row = make("div", { className: "thumbs" }), words = make("ul");
    const facts = [count(one.samples, box.dataset.unit), one.class];
    if (name !== number) facts.unshift(number);
    const copies = Object.keys(alike).length;
    if (copies) facts.push(count(copies, "near-duplicate"));
    head.append(make("span", { textContent: facts.filter(Boolean).join(" · ") }));
    const tile = (item, i) => {
      const whole = make("figure");
      const same = i in alike ? `, nearly the same as ${one.members[alike[i]]}` : "";
      whole.append(image(box.dataset.run, item.picture, item.caption + same));
      if (same) whole.append(make("b", { textContent: "≈" }));
      if (one.members) whole.append(make("figcaption", { textContent: one.members[i].split("/").pop(), title: one.members[i] }));
      return whole;
    };
    row.append(...items.slice(0, FEW).map(tile));
    words.append(...[...new Set(one.captions ?? one.names ?? [])].map(text => make("li", { textContent: text })));
    const whole = make("div", { className: "proto" });
    whole.append(make("h3", { textContent: name }), head, row);
    if (words.children.length) whole.append(make("small", { textContent: `${one.captions ? "Captions" : "Rows"} nearest to the mean:` }), words);
    if (one.members) {  // all pictures and names, written when they are asked for: there may be very many
      const all = make("button"), names = make("pre"), rest = one.members.slice(items.length);
      const show = open => {
        whole.classList.toggle("open", open);
        all.textContent = open ? "show fewer" : items.length ? "show all" : "all names";
        all.setAttribute("aria-expanded", open);
        all.setAttribute("aria-label", `${all.textContent} of ${name}`);
        row.replaceChildren(...items.slice(0, open ? items.length : FEW).map(tile));
        names.textContent = rest.map((text, i) => {
          const same = alike[i + items.length];
          return same === undefined ? text : `${text} ≈ ${one.members[same]}`;
        }).join("\n");
        names.hidden = !open || !rest.length;
      };
      all.onclick = () => show(!whole.classList.contains("open"));
      show(false);
      head.append(all);
      whole.append(names);
    }
    return whole;
  };
  const more = number => {  // the sections below stay near: the rest comes when it is asked for
    const first = shown;
    list.append(...cards.slice(shown, shown += number).map(card));
    const left = cards.length - shown;
    end.replaceChildren(...(left <= 0 ? [] : left <= STEP ? [[left, `show the other ${left}`]] :
      [[STEP, `show ${STEP} more`], [left, `show all ${cards.length.toLocaleString()}`]]).map(([next, words]) => {
      const button = make("button", { textContent: words });
      button.onclick = () => more(next);
      return button;
    }));
    if (first) {  // the keyboard goes on with the first new card
      list.children[first].tabIndex = -1;
      list.children[first].focus();
    }
  };
  const fill = () => { if (box.open && !shown) more(STEP); };
  box.addEventListener("toggle", fill);
  fill();
  list.after(end);
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
  let unit = 1, here = -1;  // canvas pixels of a CSS pixel; the dot that is described
  const at = i => [20 * unit + (xy[2 * i] / 65535) * (canvas.width - 40 * unit),  // half a picture
                   20 * unit + (xy[2 * i + 1] / 65535) * (canvas.height - 40 * unit)];

  function fit() {  // sharp dots on any screen; the style says how large the canvas is
    unit = devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * unit);
    canvas.height = Math.round(canvas.clientHeight * unit);
    draw();
  }

  function draw() {
    const own = ids[state.by], names = state.by ? data.by[state.by].names : [];
    const total = names.length || (own ? own.reduce((a, b) => Math.max(a, b), 0) + 1 : 1);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const size = (n > 20000 ? 1.6 : n > 4000 ? 2.4 : 3.4) * unit * (canvas.clientWidth < 560 ? 0.7 : 1);
    const side = (state.only < 0 ? 28 : 40) * unit;  // of a picture
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
        const longest = Math.max(face.width, face.height), w = side * face.width / longest, h = side * face.height / longest;
        if (face.complete && longest) pen.drawImage(face, x - w / 2, y - h / 2, w, h);
      }
    }
    if (here >= 0) {
      pen.globalAlpha = 1;
      pen.strokeStyle = dark.matches ? "#fff" : "#000";
      pen.lineWidth = 2 * unit;
      pen.beginPath();
      pen.arc(...at(here), 9 * unit, 0, 7);
      pen.stroke();
    }
    key.replaceChildren(...names.slice(0, 40).map((name, id) => {
      const item = make("button"), mark = make("i");
      mark.style.background = hue(id, total);
      item.append(mark, name);
      item.setAttribute("aria-pressed", state.only < 0 || state.only === id);
      item.onclick = () => { state.only = state.only === id ? -1 : id; draw(); };
      return item;
    }));
    if (here < 0) hint.textContent = "Point at a dot to see its sample, or press the arrow keys on the map. " + (
      !own ? "" : names.length ? "Click a name to see only its dots."
      : `${total.toLocaleString()} cluster${total === 1 ? "" : "s"}, each in its own colour; click a dot, or press Enter, to see only its cluster.`);
  }

  const choice = make("select");
  choice.setAttribute("aria-label", "colour by");
  for (const name in data.by) choice.add(new Option("colour by " + name, name));
  choice.onchange = () => { state.by = choice.value; state.only = -1; draw(); };
  if (choice.length > 1) tools.append(choice);
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
    let best = -1, least = 200 * unit * unit;
    for (let i = 0; i < dots; i++) {
      if (!state.shown[+(i >= n)]) continue;
      const [a, b] = at(i), d = (a - x) ** 2 + (b - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }
  function describe(i) {
    const words = data.words[i % n], seen = data.pictures[i % n] >= 0;
    hint.replaceChildren((i >= n ? "caption: " : seen ? "image of: " : "") + words);
    if (seen) hint.prepend(image(box.dataset.run, data.pictures[i % n], words));
  }
  function choose(i) {  // only its class or cluster, or everything again
    const own = ids[state.by];
    state.only = i < 0 || !own || own[i % n] === state.only ? -1 : own[i % n];
    draw();
  }
  function step(key) {  // the nearest dot that lies more to this side than to another one
    const [x, y] = here < 0 ? [canvas.width / 2, canvas.height / 2] : at(here);
    let best = -1, least = Infinity;
    for (let i = 0; i < dots; i++) {
      if (i === here || !state.shown[+(i >= n)]) continue;
      const [a, b] = at(i), right = a - x, down = b - y;
      const ahead = { ArrowRight: right, ArrowLeft: -right, ArrowDown: down, ArrowUp: -down }[key];
      const aside = /Left|Right/.test(key) ? down : right;
      if (ahead <= 0 || ahead < Math.abs(aside) || ahead * ahead + aside * aside >= least) continue;
      least = ahead * ahead + aside * aside;
      best = i;
    }
    if (best >= 0) here = best;
  }
  canvas.onpointermove = event => {
    const i = nearest(event);
    if (i >= 0) describe(i);
  };
  canvas.onclick = event => choose(nearest(event));
  canvas.onkeydown = event => {
    if (event.key.startsWith("Arrow")) step(event.key);
    else if (event.key === "Enter") choose(here);
    else if (event.key === "Escape") { here = -1; state.only = -1; }
    else return;
    event.preventDefault();
    draw();
    if (here >= 0) describe(here);
  };
  canvas.setAttribute("aria-label", `map of ${n.toLocaleString()} samples; arrow keys go from one to the next`);
  dark.addEventListener("change", draw);
  new ResizeObserver(fit).observe(canvas);
  fit();
}
document.querySelectorAll(".map").forEach(map);
