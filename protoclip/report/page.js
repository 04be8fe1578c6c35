// The maps: dots on a canvas, coloured by a known class or by prototype.
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const dark = matchMedia("(prefers-color-scheme: dark)");

function hue(id, total, named) {
  if (id < 0) return dark.matches ? "#4a525c" : "#c5ccd4";
  const light = dark.matches ? 66 : 46;
  // Few classes get even steps around the circle; many prototypes the golden angle.
  const angle = named && total <= 24 ? (360 * id) / total : (id * 137.508) % 360;
  const shift = named ? (id % 2) * 12 - 6 : ((id * 7) % 5) * 4 - 8;
  return `hsl(${angle.toFixed(1)} 68% ${light + shift}%)`;
}

function map(box) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const xy = new Uint16Array(bytes(data.xy)), n = data.n;
  const canvas = box.querySelector("canvas"), pen = canvas.getContext("2d");
  const tools = box.querySelector(".tools"), hint = box.querySelector("[data-hint]");
  const key = document.createElement("div");
  key.className = "legend";
  canvas.after(key);
  const state = { by: Object.keys(data.by)[0], only: -1, shown: [true, true] };
  const ids = {};
  for (const name in data.by) ids[name] = new Int16Array(bytes(data.by[name].ids));
  const at = i => [14 + (xy[2 * i] / 65535) * (canvas.width - 28),
                   14 + (xy[2 * i + 1] / 65535) * (canvas.height - 28)];

  function draw() {
    const own = ids[state.by], names = state.by ? data.by[state.by].names : [];
    const total = names.length || (own ? own.reduce((a, b) => Math.max(a, b), 0) + 1 : 1);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const size = n > 20000 ? 1.6 : n > 4000 ? 2.4 : 3.4;
    for (const faint of [true, false]) {
      for (let i = 0; i < 2 * n; i++) {
        const text = i >= n;
        if (!state.shown[+text]) continue;
        const id = own ? own[i % n] : 0;
        const pale = state.only >= 0 && id !== state.only;
        if (pale !== faint) continue;
        const [x, y] = at(i);
        pen.globalAlpha = pale ? 0.08 : n > 20000 ? 0.5 : 0.8;
        pen.fillStyle = hue(id, total, names.length > 0);
        pen.beginPath();
        if (text) pen.rect(x - size * 0.8, y - size * 0.8, size * 1.6, size * 1.6);
        else pen.arc(x, y, size, 0, 7);
        pen.fill();
      }
    }
    key.replaceChildren(...names.slice(0, 40).map((name, id) => {
      const item = document.createElement("button");
      const mark = document.createElement("i");
      mark.style.background = hue(id, total, true);
      item.append(mark, name);
      item.setAttribute("aria-pressed", state.only < 0 || state.only === id);
      item.onclick = () => { state.only = state.only === id ? -1 : id; draw(); };
      return item;
    }));
    hint.textContent = names.length
      ? "Choose a name to see it alone." + (data.words.length ? " Point at a dot to read it." : "")
      : `${total.toLocaleString()} prototypes, each in its colour; click a dot to see its prototype alone.`;
  }

  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "colour by");
  for (const name in data.by) choice.add(new Option("colour by " + name, name));
  choice.onchange = () => { state.by = choice.value; state.only = -1; draw(); };
  if (choice.length) tools.append(choice);
  ["images ●", "captions ■"].forEach((word, i) => {
    const item = document.createElement("button");
    item.textContent = word;
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
    for (let i = 0; i < 2 * n; i++) {
      if (!state.shown[+(i >= n)]) continue;
      const [a, b] = at(i), d = (a - x) ** 2 + (b - y) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }
  canvas.onpointermove = event => {
    const i = nearest(event);
    if (i < 0 || !data.words.length) return;
    hint.textContent = (i >= n ? "caption: " : "image of: ") + data.words[i % n];
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
