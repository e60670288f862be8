// Measures the page as the browser laid it out, for browser_test.go.
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  for (const d of all("details")) d.open = true;
  const width = e => e.getBoundingClientRect().width;
  const bar = e => {
    const parts = all(":scope > span", e);
    return { Class: e.className, Width: width(e), Sum: parts.reduce((s, p) => s + width(p), 0), Min: Math.min(...parts.map(width)),
      Colours: new Set(parts.map(p => getComputedStyle(p).backgroundColor)).size };
  };
  const rgb = c => c.match(/[\d.]+/g).map(Number);
  const under = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = e => {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(under(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const texts = all("main *, header *, footer").filter(e => Array.from(e.childNodes).some(n => n.nodeType === 3 && n.data.trim()));
  const rows = {};
  for (const t of all("table")) rows[t.className || "other"] = (rows[t.className || "other"] || 0) + t.tBodies[0].rows.length;
  const found = {
    Title: document.title, Scripts: document.scripts.length - 1, Images: all("img, iframe, object, embed, svg").length,
    Handlers: all("*").filter(e => Array.from(e.attributes).some(a => a.name.startsWith("on"))).length,
    Links: all("[href], [src]").filter(e => !/^(#|data:,$)/.test(e.getAttribute("href") || e.getAttribute("src"))).length,
    Owned: "owned" in window, Sections: all("h2, h3").map(e => e.firstChild.textContent.trim()), Rows: rows,
    Bars: all(".bar, .bars").map(bar), Overflow: document.documentElement.scrollWidth - innerWidth,
    Unnamed: all("[role=img], [role=region], nav").filter(e => !e.getAttribute("aria-label")).map(e => e.outerHTML.slice(0, 80))
      .concat(all("th:not([scope])").map(e => e.outerHTML)),
    LowContrast: texts.filter(e => contrast(e) < 4.5).map(e => contrast(e).toFixed(2) + " " + e.outerHTML.slice(0, 80)).slice(0, 10),
    Dark: matchMedia("(prefers-color-scheme: dark)").matches,
  };
  const pre = document.createElement("pre");
  pre.id = "measured";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
})();
