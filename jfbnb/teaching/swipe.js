// The swipe comparison, in the browser alone: no kernel, no library, no request.
//
// `mount(el)` turns the <figure> elements inside `el` (an <img> and a <figcaption> each) into one
// comparison. Without scripts the figures stay what they are: labelled pictures in a row. It returns
// how it is looked at: given to the next `mount`, handle, menus and zoom stay as they were.

function mount(el, before) {
  const figures = [...el.querySelectorAll("figure")];
  const images = figures.map((figure) => ({
    label: figure.dataset.label,
    metrics: figure.dataset.metrics || "",
    img: figure.querySelector("img"),
  }));
  const truth = figures.findIndex((figure) => "truth" in figure.dataset);
  const state = {
    left: Number(el.dataset.left), right: Number(el.dataset.right), position: 0.5,
    zoom: 1, x: 0, y: 0, // x, y: the picture's top left corner, in its own pixels
    error: false,
  };

  // --- elements ---------------------------------------------------------------------------------
  const make = (tag, parent, properties = {}) =>
    parent.appendChild(Object.assign(document.createElement(tag), properties));
  const root = make("div", el, { className: "jfbnb-swipe" });
  const bar = make("div", root, { className: "jfbnb-bar" });
  const menu = (side) => {
    const label = make("label", bar, { textContent: `${side} ` });
    const select = make("select", label);
    images.forEach((image, i) => make("option", select, { value: i, textContent: image.label }));
    select.addEventListener("change", () => set({ [side]: Number(select.value) }));
    return select;
  };
  const menus = { left: menu("left"), right: menu("right") };
  const button = (text, title, action) => {
    const made = make("button", bar, { type: "button", textContent: text, title });
    made.setAttribute("aria-label", title);
    made.addEventListener("click", action);
    return made;
  };
  button("−", "zoom out", () => zoomAt(1 / 1.5));
  button("+", "zoom in", () => zoomAt(1.5));
  button("reset", "whole image, handle in the middle", () =>
    set({ zoom: 1, x: 0, y: 0, position: 0.5, error: false }));
  let errorBox = null;
  if (truth >= 0) {
    const label = make("label", bar);
    errorBox = make("input", label, { type: "checkbox" });
    label.append(` error × ${ERROR_GAIN}`);
    errorBox.addEventListener("change", () => set({ error: errorBox.checked }));
  }
  const canvas = make("canvas", root, { tabIndex: 0 });
  canvas.setAttribute("role", "slider");
  canvas.setAttribute("aria-label", "swipe handle between two images");
  canvas.setAttribute("aria-valuemin", 0);
  canvas.setAttribute("aria-valuemax", 100);
  const captions = make("div", root, { className: "jfbnb-captions" });
  const caption = { left: make("div", captions), right: make("div", captions) };
  const readout = make("div", root, { className: "jfbnb-readout" });
  const HINT = "Drag to swipe. Ctrl + wheel or + and − zoom, then drag to move. Arrow keys work.";
  readout.textContent = HINT;
  const context = canvas.getContext("2d");

  // --- pixels -----------------------------------------------------------------------------------
  let W = 0, H = 0, scale = 1;

  function prepare() {
    W = images[0].img.naturalWidth;
    H = images[0].img.naturalHeight;
    scale = Math.max(1, Math.round(512 / Math.max(W, H)));
    canvas.width = W * scale;
    canvas.height = H * scale;
    root.style.width = `${Math.max(canvas.width, 320)}px`;
    for (const image of images) {
      const own = Object.assign(document.createElement("canvas"), { width: W, height: H });
      const drawing = own.getContext("2d", { willReadFrequently: true });
      drawing.drawImage(image.img, 0, 0);
      image.canvas = own;
      image.pixels = drawing.getImageData(0, 0, W, H).data;
    }
    for (const image of truth >= 0 ? images : []) image.errorCanvas = errorMap(image);
    figures.forEach((figure) => { figure.style.display = "none"; });
    set({});
  }

  // |x - truth|, averaged over the channels: black is none.
  function errorMap(image) {
    const own = Object.assign(document.createElement("canvas"), { width: W, height: H });
    const drawing = own.getContext("2d");
    const map = drawing.createImageData(W, H);
    for (let i = 0; i < map.data.length; i += 4) {
      let sum = 0;
      for (let c = 0; c < 3; c++) sum += Math.abs(image.pixels[i + c] - images[truth].pixels[i + c]);
      map.data.fill(Math.min(255, (ERROR_GAIN * sum) / 3), i, i + 3);
      map.data[i + 3] = 255;
    }
    drawing.putImageData(map, 0, 0);
    return own;
  }

  // --- drawing ----------------------------------------------------------------------------------
  function draw() {
    if (!W) return;
    const split = Math.round(state.position * canvas.width);
    context.imageSmoothingEnabled = false;
    const half = (image, from, to) => {
      if (to <= from) return;
      context.save();
      context.beginPath();
      context.rect(from, 0, to - from, canvas.height);
      context.clip();
      const z = state.zoom * scale;
      context.drawImage(state.error ? image.errorCanvas : image.canvas,
        -state.x * z, -state.y * z, W * z, H * z);
      context.restore();
    };
    half(images[state.left], 0, split);
    half(images[state.right], split, canvas.width);
    context.fillStyle = "#ffffff";
    context.fillRect(split - 1, 0, 2, canvas.height);
    context.fillStyle = "#0072B2";
    context.beginPath();
    context.arc(split, canvas.height / 2, 9, 0, 2 * Math.PI);
    context.fill();
  }

  function set(change) {
    Object.assign(state, change);
    const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
    state.position = clamp(state.position, 0, 1);
    state.zoom = clamp(state.zoom, 1, 16);
    state.x = clamp(state.x, 0, W - W / state.zoom);
    state.y = clamp(state.y, 0, H - H / state.zoom);
    for (const side of ["left", "right"]) {
      const image = images[state[side]];
      menus[side].value = state[side];
      caption[side].textContent = [image.label, image.metrics].filter(Boolean).join(": ");
    }
    if (errorBox) errorBox.checked = state.error;
    const percent = Math.round(100 * state.position);
    canvas.setAttribute("aria-valuenow", percent);
    canvas.setAttribute("aria-valuetext",
      `${percent}% ${images[state.left].label}, then ${images[state.right].label}`);
    draw();
  }

  // Zoom about a point of the canvas, its middle unless one is given.
  function zoomAt(factor, cx = canvas.width / 2, cy = canvas.height / 2) {
    const before = state.zoom * scale;
    const zoom = Math.min(16, Math.max(1, state.zoom * factor));
    const after = zoom * scale;
    set({ zoom, x: state.x + cx / before - cx / after, y: state.y + cy / before - cy / after });
  }

  // --- mouse, touch, keyboard -------------------------------------------------------------------
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * canvas.width,
      ((event.clientY - box.top) / box.height) * canvas.height];
  };
  const fingers = new Map();
  let swiping = false;

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
    const [x, y] = at(event);
    fingers.set(event.pointerId, [x, y]);
    // Zoomed in, the handle is swiped by the handle, and the picture is moved elsewhere.
    const near = Math.abs(x - state.position * canvas.width) < 0.06 * canvas.width;
    swiping = fingers.size === 1 && (state.zoom === 1 || near);
    if (swiping) set({ position: x / canvas.width });
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    hover(x, y);
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const spread = () => {
      const [[ax, ay], [bx, by]] = [...fingers.values()];
      return Math.hypot(ax - bx, ay - by);
    };
    const apart = fingers.size === 2 ? spread() : 0;
    fingers.set(event.pointerId, [x, y]);
    const z = state.zoom * scale;
    if (fingers.size === 2 && apart > 0) zoomAt(spread() / apart, x, y);
    else if (swiping) set({ position: x / canvas.width });
    else set({ x: state.x - (x - before[0]) / z, y: state.y - (y - before[1]) / z });
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("pointerleave", () => { readout.textContent = HINT; });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // a plain wheel scrolls the page
    event.preventDefault();
    zoomAt(event.deltaY < 0 ? 1.2 : 1 / 1.2, ...at(event));
  }, { passive: false });
  const keys = (event) => {
    if (event.target !== canvas) return;
    const step = event.shiftKey ? 0.1 : 0.02;
    const move = W / state.zoom / 10;
    const actions = event.altKey ? {
      ArrowLeft: () => set({ x: state.x - move }), ArrowRight: () => set({ x: state.x + move }),
      ArrowUp: () => set({ y: state.y - move }), ArrowDown: () => set({ y: state.y + move }),
    } : {
      ArrowLeft: () => set({ position: state.position - step }),
      ArrowRight: () => set({ position: state.position + step }),
      Home: () => set({ position: 0 }), End: () => set({ position: 1 }),
      "+": () => zoomAt(1.5), "-": () => zoomAt(1 / 1.5),
      0: () => set({ zoom: 1, x: 0, y: 0 }),
    };
    if (!(event.key in actions)) return;
    actions[event.key]();
    event.preventDefault();
    event.stopPropagation();
  };
  // At the window, before Jupyter: it has uses of its own for the arrow keys.
  canvas.addEventListener("focus", () => window.addEventListener("keydown", keys, true));
  canvas.addEventListener("blur", () => window.removeEventListener("keydown", keys, true));

  function hover(x, y) {
    const z = state.zoom * scale;
    const column = Math.floor(state.x + x / z), row = Math.floor(state.y + y / z);
    if (column < 0 || row < 0 || column >= W || row >= H) return;
    const value = (image) => [0, 1, 2]
      .map((c) => (image.pixels[4 * (row * W + column) + c] / 255).toFixed(2)).join(" ");
    readout.textContent = `row ${row}, column ${column}: ` +
      [state.left, state.right].map((i) => `${images[i].label} ${value(images[i])}`).join(" | ");
  }

  if (before) {
    Object.assign(state, before.view());
    for (const side of ["left", "right"]) {
      const same = images.findIndex((image) => image.label === before.label(side));
      if (same >= 0) state[side] = same;
    }
    state.error = state.error && truth >= 0;
  }
  Promise.all(images.map((image) => image.img.decode())).then(prepare);
  return {
    view: () => ({ position: state.position, zoom: state.zoom, x: state.x, y: state.y,
      error: state.error }),
    label: (side) => images[state[side]].label,
  };
}

const ERROR_GAIN = 5;
