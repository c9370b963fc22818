// What a person would not like to see on a page, as lists of what is wrong; evaluated in the page by tests/browser.py.
(() => {
  const box = (e) => e.getBoundingClientRect();

  // Elements that reach out of the window, outside what may be scrolled.
  const overflowing = () =>
    [...document.querySelectorAll("main *")]
      .filter((e) => !e.closest(".scroll, pre, svg, .caption"))
      .filter((e) => box(e).right > document.documentElement.clientWidth + 1)
      .map((e) => `${e.tagName}.${e.className}`);

  // Labels of a chart that lie on each other or leave their picture.
  const collisions = () =>
    [...document.querySelectorAll("svg")].flatMap((svg) => {
      const frame = box(svg);
      const labels = [...svg.querySelectorAll("text")].map((t) => [t.textContent, box(t)]);
      const out = labels.filter(
        ([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1,
      );
      const over = (a, b) =>
        a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
      const hit = labels.filter(([, a], i) => labels.slice(i + 1).some(([, b]) => over(a, b)));
      return [...out, ...hit].map(([text]) => `${svg.getAttribute("aria-label")}: ${text}`);
    });

  // Text whose contrast with what is behind it is below 4.5 (WCAG 2, level AA).
  const light = (colour) => {
    const [r, g, b] = colour
      .match(/[\d.]+/g)
      .slice(0, 3)
      .map((x) => x / 255)
      .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\)|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const says = (e) => [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
  const faint = () =>
    [...document.querySelectorAll("main *, nav *")]
      .filter((e) => !e.closest("svg") && says(e))
      .map((e) => {
        const [dark, bright] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => x - y);
        return [(bright + 0.05) / (dark + 0.05), `${e.tagName}.${e.className}`];
      })
      .filter(([ratio]) => ratio < 4.5)
      .map(([ratio, name]) => `${name} ${ratio.toFixed(2)}`);

  return { overflowing: overflowing(), collisions: collisions(), faint: faint() };
})();
