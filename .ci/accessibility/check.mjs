// axe-core over the given pages, in jsdom: all rules that need no layout. Contrast is a matter of a browser.
import { readFileSync } from "node:fs";
import { JSDOM } from "jsdom";

const axe = readFileSync(new URL("./node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
let failed = 0;
for (const file of process.argv.slice(2)) {
  const { window } = new JSDOM(readFileSync(file, "utf8"), { runScripts: "outside-only" });
  window.eval(axe);
  const options = { rules: { "color-contrast": { enabled: false } } };
  const { violations, passes } = await window.axe.run(window.document, options);
  console.log(`${file.split("/").pop()}: ${violations.length} violations, ${passes.length} rules passed`);
  for (const rule of violations) {
    console.log(`  ${rule.id}: ${rule.help}: ${rule.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
  }
  failed += violations.length + (passes.length < 10);
}
process.exit(failed ? 1 : 0);
