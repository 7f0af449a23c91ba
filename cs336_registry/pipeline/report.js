// The pointer's read-out: the values of every curve at the pointer's place.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const line = figure.querySelector(".pointer");
  const output = figure.querySelector("output");
  const [low, high] = chart.domain;
  const box = svg.viewBox.baseVal;
  const left = 52, right = box.width - 14;
  const nearest = (points, x) => points.reduce((best, one) => (Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best));
  svg.addEventListener("pointermove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const pixel = Math.min(right, Math.max(left, ((event.clientX - bounds.left) / bounds.width) * box.width));
    const x = low + ((pixel - left) / (right - left)) * (high - low);
    const rows = chart.series.map((one) => [one.name, nearest(one.points, x)]);
    const place = left + ((rows[0][1][0] - low) / (high - low)) * (right - left);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.setAttribute("visibility", "visible");
    output.hidden = false;
    output.textContent = [`${chart.x} ${Number(rows[0][1][0].toPrecision(5))}`, ...rows.map(([name, point]) => `${name}  ${Number(point[1].toPrecision(4))}`)].join("\n");
    const share = (place / box.width) * bounds.width;
    output.style.left = share > bounds.width / 2 ? "auto" : `${share + 12}px`;
    output.style.right = share > bounds.width / 2 ? `${bounds.width - share + 12}px` : "auto";
  });
  svg.addEventListener("pointerleave", () => {
    output.hidden = true;
    line.setAttribute("visibility", "hidden");
  });
  figure.dataset.ready = "";
}
