// Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
// Three linked planes of a volume with label maps over it; the voxels are in the page, see __init__.py.
"use strict";
(() => {
  const PLANES = [
    // across and up are axes of the volume (0 right, 1 forward, 2 up); through is the one that its slider moves along
    { name: "axial", across: 0, up: 1, through: 2, ends: ["L", "R", "P", "A"] },
    { name: "coronal", across: 0, up: 2, through: 1, ends: ["L", "R", "I", "S"] },
    { name: "sagittal", across: 1, up: 2, through: 0, ends: ["P", "A", "I", "S"] },
  ];
  const GAP = 12; // pixels between planes
  let count = 0;

  async function inflated(text) {
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function rgb(colour) {
    return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  }

  class Viewer {
    constructor(figure, about, image, maps) {
      this.about = about;
      this.image = image;
      this.shape = about.shape;
      this.at = [...about.at];
      this.steps = [1, this.shape[0], this.shape[0] * this.shape[1]];
      this.colours = [[0, 0, 0], ...about.values.map((value) => rgb(value.colour))];
      this.layers = about.maps.map((name, i) => ({ name, voxels: maps[i], shown: true, outline: i === 0 }));
      this.opacity = 0.5;
      this.brightness = 1;
      this.panels = PLANES.map((plane) => this.panel(plane));
      this.row = element("div", { className: "planes" }, ...this.panels.map((panel) => panel.box));
      this.readout = element("output", { className: "readout" });
      figure.querySelector("figcaption").after(this.controls(), this.row, this.readout, this.legend());
      new ResizeObserver(() => this.fit()).observe(this.row);
      this.fit();
    }

    controls() {
      const bar = element("div", { className: "controls" });
      for (const layer of this.layers) {
        const box = element("input", { type: "checkbox", checked: true });
        box.addEventListener("change", () => ((layer.shown = box.checked), this.draw()));
        bar.append(element("label", {}, box, ` ${layer.name}`));
      }
      if (this.layers.length > 1) bar.append(this.range("opacity", 0, 1, (value) => (this.opacity = value), 0.5));
      if (this.image) bar.append(this.range("brightness", 0.4, 2.5, (value) => (this.brightness = value), 1));
      return bar;
    }

    range(name, min, max, set, value) {
      const slider = element("input", { type: "range", min, max, step: 0.05, value });
      slider.addEventListener("input", () => (set(Number(slider.value)), this.draw()));
      return element("label", {}, `${name} `, slider);
    }

    legend() {
      const named = this.about.values.map((value) => {
        const mark = element("span", { className: "mark" });
        mark.style.background = value.colour;
        return element("li", {}, mark, value.name);
      });
      return element("ul", { className: "legend" }, ...named);
    }

    panel(plane) {
      const canvas = element("canvas", { tabIndex: 0 });
      canvas.setAttribute("role", "img");
      const most = this.shape[plane.through] - 1;
      const slider = element("input", { type: "range", min: 0, max: most, step: 1 });
      slider.id = `plane${count++}`;
      const title = element("label", { htmlFor: slider.id });
      const panel = { plane, canvas, slider, title, box: element("div", { className: "plane" }, title, canvas, slider) };
      slider.addEventListener("input", () => this.move(plane.through, Number(slider.value)));
      const point = (event) => {
        const area = canvas.getBoundingClientRect();
        const across = Math.floor(((event.clientX - area.left) / area.width) * this.shape[plane.across]);
        const up = Math.floor((1 - (event.clientY - area.top) / area.height) * this.shape[plane.up]);
        this.move(plane.across, across, plane.up, up);
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.focus();
        if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
        point(event);
      });
      canvas.addEventListener("pointermove", (event) => event.buttons & 1 && point(event));
      canvas.addEventListener("keydown", (event) => {
        const moves = {
          ArrowLeft: [plane.across, -1],
          ArrowRight: [plane.across, 1],
          ArrowDown: [plane.up, -1],
          ArrowUp: [plane.up, 1],
          PageDown: [plane.through, -1],
          PageUp: [plane.through, 1],
        };
        const [axis, by] = moves[event.key] || [];
        if (axis === undefined) return;
        event.preventDefault();
        this.move(axis, this.at[axis] + by * (event.shiftKey ? 10 : 1));
      });
      return panel;
    }

    move(...pairs) {
      for (let i = 0; i < pairs.length; i += 2)
        this.at[pairs[i]] = Math.min(Math.max(pairs[i + 1], 0), this.shape[pairs[i]] - 1);
      this.draw();
    }

    fit() {
      const mm = (axis) => this.shape[axis] * this.about.sides_mm[axis];
      const widths = PLANES.map((plane) => mm(plane.across));
      const tallest = Math.max(...PLANES.map((plane) => mm(plane.up)));
      const narrow = this.row.clientWidth < 560;
      const whole = Math.floor(this.row.getBoundingClientRect().width);
      const room = narrow ? whole : whole - 2 * GAP;
      const wanted = narrow ? Math.max(...widths) : widths.reduce((sum, width) => sum + width, 0);
      const scale = Math.min(room / wanted, Math.max(window.innerHeight * 0.62, 240) / tallest);
      for (const { plane, canvas, slider } of this.panels) {
        const sides = [mm(plane.across) * scale, mm(plane.up) * scale];
        [canvas.style.width, canvas.style.height] = sides.map((side) => `${Math.floor(side)}px`);
        [canvas.width, canvas.height] = sides.map((side) => Math.max(1, Math.round(side * devicePixelRatio)));
        slider.style.width = canvas.style.width;
      }
      this.draw();
    }

    draw() {
      this.panels.forEach((panel) => this.drawPlane(panel));
      const place = this.at.reduce((sum, at, axis) => sum + at * this.steps[axis], 0);
      const said = this.layers.map(({ name, voxels }) => {
        const value = voxels[place];
        return `${name}: ${value ? (this.about.values[value - 1] || { name: "another value" }).name : "nothing"}`;
      });
      this.readout.textContent = [`voxel ${this.at.map((at) => at * this.about.step + 1).join(", ")}`, ...said].join("; ");
    }

    drawPlane({ plane, canvas, slider, title }) {
      const [width, height] = [this.shape[plane.across], this.shape[plane.up]];
      const [right, up] = [this.steps[plane.across], this.steps[plane.up]];
      const start = this.at[plane.through] * this.steps[plane.through];
      const grey = new ImageData(width, height);
      const over = new ImageData(width, height);
      const gain = this.image ? (255 / Math.max(this.about.levels - 1, 1)) * this.brightness : 0;
      for (let y = 0; y < height; y++) {
        let from = start + (height - 1 - y) * up;
        for (let x = 0; x < width; x++, from += right) {
          const pixel = 4 * (y * width + x);
          const value = this.image ? this.image[from] * gain : 0;
          grey.data[pixel] = grey.data[pixel + 1] = grey.data[pixel + 2] = value;
          grey.data[pixel + 3] = 255;
          for (const layer of this.layers) {
            const mark = layer.shown ? layer.voxels[from] : 0;
            if (!mark || over.data[pixel + 3] === 255) continue;
            const border = layer.outline && (
              x === 0 || x === width - 1 || y === 0 || y === height - 1 || layer.voxels[from - right] !== mark ||
              layer.voxels[from + right] !== mark || layer.voxels[from - up] !== mark || layer.voxels[from + up] !== mark
            );
            if (layer.outline && !border) continue;
            const colour = this.colours[mark] || [192, 192, 192];
            over.data.set(colour, pixel);
            over.data[pixel + 3] = border ? 255 : Math.round(255 * this.opacity);
          }
        }
      }
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = true;
      for (const part of [grey, over]) {
        const small = element("canvas", { width, height });
        small.getContext("2d").putImageData(part, 0, 0);
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
        context.imageSmoothingEnabled = false;
      }
      this.cross(context, plane, canvas);
      const told = `${plane.name} ${this.at[plane.through] + 1} of ${this.shape[plane.through]}`;
      title.textContent = told;
      slider.value = this.at[plane.through];
      canvas.setAttribute("aria-label", `${told}; arrows move the crosshair, Page Up and Page Down the slice`);
    }

    cross(context, plane, canvas) {
      const x = ((this.at[plane.across] + 0.5) / this.shape[plane.across]) * canvas.width;
      const y = (1 - (this.at[plane.up] + 0.5) / this.shape[plane.up]) * canvas.height;
      const free = 8 * devicePixelRatio; // around the crosshair's middle
      context.lineWidth = devicePixelRatio;
      context.strokeStyle = "rgba(255, 255, 255, 0.75)";
      context.beginPath();
      for (const [x0, y0, x1, y1] of [
        [0, y, x - free, y], [x + free, y, canvas.width, y], [x, 0, x, y - free], [x, y + free, x, canvas.height],
      ]) {
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
      }
      context.stroke();
      const [left, right, low, high] = plane.ends;
      const size = 12 * devicePixelRatio;
      context.font = `${size}px sans-serif`;
      context.fillStyle = "#ffffff";
      context.textBaseline = "middle";
      context.textAlign = "center";
      context.fillText(left, size, canvas.height / 2);
      context.fillText(right, canvas.width - size, canvas.height / 2);
      context.fillText(low, canvas.width / 2, canvas.height - size);
      context.fillText(high, canvas.width / 2, size);
    }
  }

  async function show(figure) {
    try {
      const about = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
      const parts = [...figure.querySelectorAll('script[type="text/plain"]')];
      const voxels = [];
      for (const part of parts) voxels.push(await inflated(part.textContent));
      figure.viewer = new Viewer(figure, about, about.image ? voxels[0] : null, voxels.slice(about.image ? 1 : 0));
    } catch (error) {
      figure.append(element("p", {}, `These volumes cannot be shown: ${error}. Use a browser of 2023 or newer.`));
    }
    figure.classList.add("ready");
  }

  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        watch.unobserve(entry.target);
        show(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  document.querySelectorAll("figure.viewer").forEach((figure) => watch.observe(figure));
})();
