// Moving and zooming the drawing.

const view = { x: 0, y: 0, scale: 1 };

function applyView() {
  byId("scene").setAttribute("transform", `translate(${view.x},${view.y}) scale(${view.scale})`);
}

function zoom(factor, at = null) {
  const { width, height, left, top } = byId("drawing").getBoundingClientRect();
  const [x, y] = at ? [at.clientX - left, at.clientY - top] : [width / 2, height / 2];
  const scale = Math.min(3, Math.max(0.05, view.scale * factor));
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  applyView();
}

const READABLE = 0.62; // smaller, texts can't be read: a tall graph begins at its top instead

function fit(readable = false) {
  const { width, height } = byId("drawing").getBoundingClientRect();
  const whole = Math.min(1.15, (width - 24) / scene.width, (height - 24) / scene.height);
  view.scale = readable === true ? Math.max(whole, Math.min(READABLE, (width - 24) / scene.width)) : whole;
  view.x = (width - scene.width * view.scale) / 2;
  view.y = Math.max(12, (height - scene.height * view.scale) / 2);
  applyView();
}

byId("zoom-in").addEventListener("click", () => zoom(1.25));
byId("zoom-out").addEventListener("click", () => zoom(0.8));
byId("fit").addEventListener("click", fit);
byId("drawing").addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY / 300), event);
    else {
      view.x -= event.shiftKey ? event.deltaY : event.deltaX;
      view.y -= event.shiftKey ? 0 : event.deltaY;
      applyView();
    }
  },
  { passive: false },
);
byId("drawing").addEventListener("pointerdown", (event) => {
  if (event.button) return;
  view.from = [event.clientX - view.x, event.clientY - view.y, event.clientX, event.clientY];
  view.moved = false;
});
window.addEventListener("pointermove", (event) => {
  if (!view.from) return;
  const [x, y, startX, startY] = view.from;
  if (!view.moved && Math.hypot(event.clientX - startX, event.clientY - startY) < 4) return;
  view.moved = true;
  byId("drawing").classList.add("moving");
  view.x = event.clientX - x;
  view.y = event.clientY - y;
  applyView();
});
window.addEventListener("pointerup", () => {
  view.from = null;
  byId("drawing").classList.remove("moving");
});
