"use strict";
// Without this script the page shows every pair side by side; with it, one at a time.
(() => {
  const viewer = document.querySelector(".viewer");
  const pairs = [...viewer.querySelectorAll(".pair")];
  const controls = viewer.querySelector(".controls");
  const guidance = controls.querySelector("select");
  const picture = controls.querySelector("input[type=number]");
  const views = [...controls.querySelectorAll("input[type=radio]")];
  const chosen = viewer.querySelector(".chosen");
  const { columns, rows, count, cell, kind } = viewer.dataset;
  const across = Number(columns), down = Number(rows), total = Number(count);
  const conditions = JSON.parse(viewer.dataset.conditions);

  const pair = () => pairs[guidance ? Number(guidance.value) : 0];
  const view = () => views.find((radio) => radio.checked).value;

  function cut(share) {
    for (const one of pairs) {
      one.style.setProperty("--cut", `${share}%`);
      one.querySelector(".cut").value = share;
    }
  }

  function turn(turned) {
    for (const one of pairs) {
      one.classList.toggle("turned", turned);
      const button = one.querySelector(".flip");
      button.setAttribute("aria-pressed", String(turned));
      button.textContent = turned ? "Show dense" : "Show pruned";
    }
  }

  function show() {
    const now = pair(), how = view();
    for (const one of pairs) {
      one.hidden = one !== now;
      one.classList.toggle("side", how === "side");
      one.classList.toggle("slider", how === "slider");
      one.classList.toggle("flipped", how === "flip");
      one.querySelector(".cut").hidden = how !== "slider";
      one.querySelector(".flip").hidden = how !== "flip";
      const heading = one.querySelector("h3");
      if (heading) heading.hidden = true; // the control says it
    }
    pick(Number(picture.value));
  }

  function pick(number) {
    const index = Math.min(Math.max(Math.round(number) || 1, 1), total) - 1;
    const column = index % across, row = Math.floor(index / across);
    const [dense, pruned] = pair().querySelectorAll(".sheet img");
    const sources = { dense: [dense], pruned: [pruned], difference: [dense, pruned] };
    for (const [name, images] of Object.entries(sources)) {
      const crop = chosen.querySelector(`.crop.${name}`);
      crop.style.aspectRatio = cell;
      crop.replaceChildren(...images.map((image) => {
        const copy = document.createElement("img");
        copy.src = image.src;
        copy.alt = images.length > 1 ? "" : `Picture ${index + 1} of the ${name} model`;
        copy.style.width = `${100 * across}%`;
        copy.style.left = `${-100 * column}%`;
        copy.style.top = `${-100 * row}%`;
        return copy;
      }));
    }
    chosen.querySelector(".which").textContent =
      `Picture ${index + 1}, ${kind} ${conditions[index]}. ` +
      "The difference is four times as bright as it is; black is equal.";
    for (const sheet of viewer.querySelectorAll(".sheet")) {
      let spot = sheet.querySelector(".spot");
      if (!spot) {
        spot = document.createElement("div");
        spot.className = "spot";
        sheet.append(spot);
      }
      spot.hidden = view() !== "side";
      spot.style.left = `${100 * column / across}%`;
      spot.style.top = `${100 * row / down}%`;
      spot.style.width = `${100 / across}%`;
      spot.style.height = `${100 / down}%`;
    }
  }

  function place(sheet, event) {
    const box = sheet.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  for (const one of pairs) {
    one.querySelector(".cut").addEventListener("input", (event) => cut(event.target.value));
    one.querySelector(".flip").addEventListener("click", () => turn(!one.classList.contains("turned")));
    for (const sheet of one.querySelectorAll(".sheet")) {
      sheet.addEventListener("click", (event) => {
        if (view() === "flip") return turn(!one.classList.contains("turned"));
        if (view() !== "side") return;
        const [x, y] = place(sheet, event);
        const index = Math.floor(y * down) * across + Math.floor(x * across);
        if (index >= 0 && index < total) {
          picture.value = index + 1;
          pick(index + 1);
        }
      });
      const drag = (event) => {
        if (view() === "slider" && event.buttons & 1)
          cut(Math.round(100 * Math.min(Math.max(place(sheet, event)[0], 0), 1)));
      };
      sheet.addEventListener("pointerdown", (event) => {
        if (view() !== "slider") return;
        event.preventDefault();
        sheet.setPointerCapture(event.pointerId);
        drag(event);
      });
      sheet.addEventListener("pointermove", drag);
    }
  }
  for (const control of [...views, guidance]) if (control) control.addEventListener("change", show);
  picture.addEventListener("input", () => pick(Number(picture.value)));
  // Two sheets beside each other are too small on a phone.
  const first = matchMedia("(max-width: 800px)").matches ? "slider" : "side";
  views.find((radio) => radio.value === first).checked = true;
  controls.hidden = chosen.hidden = false;
  cut(50);
  turn(false);
  show();
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
    views.find((radio) => radio.value === "side").checked = true;
    show();
  });
})();
