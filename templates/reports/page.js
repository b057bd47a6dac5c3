(function () {
  "use strict";

  const spec = JSON.parse(document.getElementById("figure-data").textContent);
  const boxes = Array.from(document.querySelectorAll("[data-figure]"));
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const hover = window.matchMedia("(hover: hover)").matches;
  const config = {
    displaylogo: false,
    displayModeBar: hover ? "hover" : false,
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  };

  // A square figure is not taller than its width asks for.
  function heightOf(box, width) {
    const height = Number(box.dataset.height);
    return "square" in box.dataset ? Math.min(height, width + 60) : height;
  }

  function draw(box, width) {
    const height = heightOf(box, width);
    box.style.height = height + "px";
    Plotly.relayout(box, { width: width, height: height });
  }

  for (const box of boxes) {
    const figure = spec.figures[box.dataset.figure];
    figure.layout.template = spec.template;
    figure.layout.width = box.clientWidth;
    figure.layout.height = heightOf(box, box.clientWidth);
    box.style.height = figure.layout.height + "px";
    // A finger that scrolls the page must not zoom a figure.
    if (touch) {
      figure.layout.dragmode = false;
    }
    const options = Object.assign(
      { toImageButtonOptions: { format: "svg", filename: box.dataset.figure } },
      config
    );
    Plotly.newPlot(box, figure.data, figure.layout, options);
  }

  // Follow the box, not the window: grids change their columns at a breakpoint.
  let printing = false;
  const observer = new ResizeObserver(function (entries) {
    for (const entry of entries) {
      const box = entry.target;
      if (!printing && box.clientWidth > 0 && box.layout.width !== box.clientWidth) {
        draw(box, box.clientWidth);
      }
    }
  });
  for (const box of boxes) {
    observer.observe(box);
  }

  // Paper has its own width: draw anew for it, then return to the screen's.
  const A4_TEXT_PX = 680;
  const GAP_PX = 18;
  window.addEventListener("beforeprint", function () {
    printing = true;
    for (const box of boxes) {
      const half = box.closest(".pair, .run-grid");
      const width = half ? (A4_TEXT_PX - GAP_PX) / 2 : A4_TEXT_PX;
      draw(box, width);
    }
  });
  window.addEventListener("afterprint", function () {
    printing = false;
    for (const box of boxes) {
      draw(box, box.clientWidth);
    }
  });

  function sortKey(cell) {
    const text = cell ? cell.dataset.sort : "";
    if (text === undefined || text === "") {
      return null;
    }
    const value = Number(text);
    return Number.isNaN(value) ? text : value;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") {
      return a - b;
    }
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    for (const head of heads) {
      const button = head.querySelector("button");
      if (!button) {
        continue;
      }
      button.addEventListener("click", function () {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) {
          other.removeAttribute("aria-sort");
        }
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const column = heads.indexOf(head);
        const body = table.tBodies[0];
        const rows = Array.from(body.rows).map(function (row) {
          return { row: row, key: sortKey(row.cells[column]) };
        });
        rows.sort(function (a, b) {
          // Rows without a value stay last in both directions.
          if (a.key === null || b.key === null) {
            return (a.key === null) - (b.key === null);
          }
          return up ? compare(a.key, b.key) : compare(b.key, a.key);
        });
        for (const entry of rows) {
          body.appendChild(entry.row);
        }
      });
    }
  }
})();
